"""The LoRA work lists cover each adapter's rows and rank blocks once, within their bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import lora_meta
from kernels.lora_meta import (
    GROUP_STARTS,
    HEADER,
    LARGE_ROWS,
    LARGE_TOKENS,
    LORA_ITEMS,
    LORA_ROWS,
    LORA_WORK,
    LoraBounds,
    PackedLayout,
    pack_lora,
)

GROUPS = st.lists(st.integers(1, 70), max_size=8)


@given(tokens=GROUPS, tile=st.sampled_from([8, 16, 32, 64]), data=st.data())
def test_every_row_and_rank_block_once(tokens: list[int], tile: int, data: st.DataObject) -> None:
    slots = data.draw(st.permutations(range(8)))[: len(tokens)]
    drawn = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=8, max_size=8))
    blocks = np.array(drawn, np.int32)
    bounds = LoraBounds(tokens=sum(tokens) + 3, tile=tile, slots=8, rank_blocks=4)
    fields = {name: np.full(shape, 2**30, np.int32) for name, shape in (("counts", (HEADER,)), *bounds.fields())}
    pack_lora(fields, list(zip(slots, tokens, strict=True)), blocks, tile)
    counts, items, work = (fields[name] for name in ("counts", "lora_items", "lora_work"))

    owner = [slot for slot, n in zip(slots, tokens, strict=True) for _ in range(n)]
    seen = [(row, slot) for first, n, slot, _ in items[: counts[LORA_ITEMS]] for row in range(first, first + n)]
    assert seen == list(enumerate(owner))
    used = [any(blocks[slot, group] for slot in slots) for group in range(len(GROUP_STARTS))]
    assert counts[list(LORA_ROWS)].tolist() == [len(owner) if some else 0 for some in used]
    units = [(int(item), int(block)) for _, _, _, block, item, *_ in work[: counts[LORA_WORK]]]
    assert units == [(i, b) for i in range(counts[LORA_ITEMS]) for b in range(max(1, blocks[items[i, 2]].max()))]
    for first, rows, slot, _, item, *_ in work[: counts[LORA_WORK]]:
        assert (first, rows, slot) == tuple(items[item, :3])
    assert (items[: counts[LORA_ITEMS], 1] <= tile).all()


@given(tokens=st.lists(st.integers(1, 300), max_size=6), more=st.integers(0, 300), data=st.data())
def test_each_tile_has_the_blocks_of_its_rows(tokens: list[int], more: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    slot_blocks = np.zeros((6, len(GROUP_STARTS)), np.int32)  # what counts is the group that has most
    slot_blocks[np.arange(6), data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))] = counts
    bounds = LoraBounds(tokens=max(sum(tokens), LARGE_TOKENS) + more, tile=16, slots=6, rank_blocks=3)
    fields = {name: np.full(shape, 2**30, np.int32) for name, shape in (("counts", (HEADER,)), *bounds.fields())}
    pack_lora(fields, list(enumerate(tokens)), slot_blocks, 16)
    owner = np.repeat(np.arange(len(tokens)), tokens)
    for index, (first, past, _, _, *own) in enumerate(fields["lora_tiles"].tolist()):
        slots = sorted(set(owner[index * LARGE_ROWS : (index + 1) * LARGE_ROWS].tolist()))
        found = fields["lora_blocks"][first:past].tolist()
        assert own == (found[0] if found else [0] * 4)
        assert [block for *_, block in found] == [block for slot in slots for block in range(counts[slot])]
        for begin, end, item, _ in found:
            slot = owner[begin]
            assert np.flatnonzero(owner == slot)[[0, -1]].tolist() == [begin, end - 1]
            assert fields["lora_items"][item, [0, 2]].tolist() == [begin, slot]


def test_fields_share_one_array_and_start_aligned() -> None:
    layout = PackedLayout((("counts", (HEADER,)), ("odd", (5,)), ("pairs", (3, 2)), ("none", (0, 4))))
    packed = torch.zeros(layout.size, dtype=torch.int32)
    views = layout.split(packed)
    assert [view.shape for view in views.values()] == [(HEADER,), (5,), (3, 2), (0, 4)]
    for view in views.values():
        assert (view.data_ptr() - packed.data_ptr()) % 16 == 0
    views["pairs"][2, 1] = 7
    assert packed[HEADER + 8 + 5] == 7


@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 512])
def test_small_batches_split_more(tokens: int) -> None:
    bounds = LoraBounds(tokens, 16, 8, 1)
    assert 2 <= lora_meta.split_bound(bounds) <= lora_meta.MAX_SPLITS
    assert lora_meta.split_bound(bounds) >= lora_meta.split_bound(LoraBounds(2 * tokens, 16, 8, 1))

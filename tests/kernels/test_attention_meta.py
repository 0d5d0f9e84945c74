"""Attention's work lists cover each sequence's queries and keys once, whoever shares the batch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention_meta import MIN_SPAN, SPAN, AttentionBounds, pack_attention
from kernels.lora_meta import DECODE_ITEMS, DECODE_SEQUENCES, HEADER, PREFILL_ITEMS, Ints

SEQUENCE = st.tuples(st.integers(0, 70_000), st.integers(1, 40))  # tokens before the step, in the step
BOUNDS = AttentionBounds(tokens=400, sequences=10, q_tile=16, splits=3, max_context=80_000)


def pack(batch: list[tuple[int, int]], window: int = 0) -> dict[str, Ints]:
    host = {name: np.full(shape, 2**30, np.int32) for name, shape in (("counts", (HEADER,)), *BOUNDS.fields())}
    starts, lengths = zip(*batch, strict=True)
    pack_attention(host, BOUNDS, range(5, 5 + len(batch)), starts, lengths, window)
    return host


@given(st.lists(SEQUENCE, min_size=1, max_size=10))
def test_prefill_items_cover_the_new_tokens(batch: list[tuple[int, int]]) -> None:
    host, row, want = pack(batch), 0, set()
    for index, (start, length) in enumerate(batch):
        if length > 1:
            want |= {(5 + index, row + i, start + i) for i in range(length)}
        row += length
    items = host["prefill_items"][: host["counts"][PREFILL_ITEMS]]
    seen = [(int(t), int(r) + i, int(p) + i) for t, r, n, p in items for i in range(n)]
    assert len(seen) == len(want)
    assert set(seen) == want
    assert (items[:, 2] <= BOUNDS.q_tile).all()
    assert (np.diff(items[:, 3]) <= 0).all()


@given(st.lists(st.tuples(st.integers(0, 70_000), st.just(1)), min_size=1, max_size=10), st.sampled_from([0, 300]))
def test_decode_items_cover_the_keys(batch: list[tuple[int, int]], window: int) -> None:
    host = pack(batch, window)
    items, sequences = host["decode_items"], host["decode_sequences"]
    assert host["counts"][DECODE_SEQUENCES] == len(batch)
    at = 0
    for index, (position, _) in enumerate(batch):
        row, first, count, _ = sequences[index]
        assert (row, first) == (index, at)
        own = items[first : first + count]
        assert (own[:, 0] == index).all()
        assert (own[:, 1] == 5 + index).all()
        assert own[0, 2] == (max(0, position + 1 - window) if window else 0)
        assert own[-1, 3] == position + 1
        assert (own[1:, 2] == own[:-1, 3]).all()
        assert ((own[:-1, 3] - own[:-1, 2]) % SPAN == 0).all()
        assert (own[:-1, 3] - own[:-1, 2] >= MIN_SPAN).all()
        assert (own[:, 3] > own[:, 2]).all()
        assert (own[:, 4] == (count == 1)).all()
        at += count
    assert host["counts"][DECODE_ITEMS] == at


def test_how_a_decode_is_cut_does_not_depend_on_the_batch() -> None:
    alone = pack([(5000, 1)])
    beside = pack([(5000, 1), (64_000, 1), (7, 20), (1, 1)])
    count = alone["decode_sequences"][0, 2]
    assert count > 1
    assert (alone["decode_items"][:count] == beside["decode_items"][:count]).all()

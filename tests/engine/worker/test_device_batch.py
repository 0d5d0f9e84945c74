"""A plan as integers: tokens, positions, places in the arena, updates and edits, and what is behind their ends."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from engine.plan import SequenceStep, StepPlan
from engine.worker.device_batch import Packed, Packer, no_edits
from engine.worker.rows import Rows, make_rows
from engine.worker.shapes import LAST, WINDOWED, Shapes, StepShape, second
from engine.worker.staging import Ints
from kernels.lora_meta import DECODE_ITEMS, GROUP_STARTS, LORA_ITEMS, LORA_ROWS, LORA_WORK, PREFILL_ITEMS
from kernels.step_meta import EDITS, EDITS_AT, ROW, SAMPLE_INTS, SAMPLES, TABLE_UPDATES
from tests.engine.worker.test_shapes import machine

BLOCKS = 128


def step(row: int, start: int, tokens: tuple[int, ...], length: int, slot: int = -1, **changes: object) -> SequenceStep:
    fields: dict[str, object] = {
        "row": row, "sequence_id": row, "slot": slot, "start": start, "length": length, "tokens": tokens,
        "first_new_block": 0, "new_blocks": (), "sample": True, "output_index": 0, "ban_stops": False,
    }  # fmt: skip
    return SequenceStep(**(fields | changes))  # type: ignore[arg-type]


STEPS = (
    step(3, 20, (), 1, slot=1),
    step(5, 0, (7, 8, 9), 3, slot=2, new_blocks=(40,), sample=False),
    step(0, 16, (11,), 1, first_new_block=1, new_blocks=(42,)),
)


def pack(
    steps: tuple[SequenceStep, ...], edits: Ints, window: int = 0, *, tail: int = 64, **changes: object
) -> tuple[Packed, Mapping[str, Ints], StepShape, Rows]:
    made = machine(**changes)
    rows = make_rows(made.max_running, BLOCKS, torch.device("cpu"))
    rows.block_table[3, :2] = 17, 4
    rows.block_table[0, :1] = 41
    for each in steps:
        rows.extend(each)
    plan = StepPlan(1, (None, 5, 6), sequences=steps)
    shape = Shapes(made, None).choose(plan.tokens, len(steps), lora=any(s.slot >= 0 for s in steps))
    host = torch.full((shape.layout.size + tail,), 2**30, dtype=torch.int32)
    fields = {name: view.numpy() for name, view in shape.layout.split(host).items()}
    fields["tail"] = host[shape.layout.size :].numpy()
    samples = np.full((sum(s.sample for s in steps), SAMPLE_INTS), 9, np.int32)
    blocks = np.zeros((8, len(GROUP_STARTS)), np.int32)  # nobody has o
    blocks[1], blocks[2] = (2, 0, 1, 0), (1, 0, 0, 1)
    packed = Packer(made, rows, window).pack(fields, shape, plan, blocks, samples, edits)
    return packed, fields, shape, rows


def test_tokens_and_their_places() -> None:
    _, fields, shape, _ = pack(STEPS, no_edits())
    assert shape.prefill
    assert fields["ids"][:5].tolist() == [-4, 7, 8, 9, 11]
    assert fields["positions"][:5].tolist() == [20, 0, 1, 2, 16]
    assert fields["locations"][:5].tolist() == [4 * 16 + 4, 640, 641, 642, 42 * 16]
    assert (fields["locations"][5:] == -1).all()
    assert (fields["ids"][5:] == 0).all()
    assert (fields["positions"][5:] == 0).all()


def test_samples_point_at_the_last_tokens() -> None:
    packed, fields, _, _ = pack(STEPS, no_edits())
    assert fields["step"][SAMPLES] == 2
    assert fields["samples"][:2, ROW].tolist() == [0, 4]
    assert [s.row for s in packed.steps] == [3, 0]
    assert packed.firsts.tolist() == [0, 1, 4]


def test_counts_of_the_lists() -> None:
    packed, fields, _, _ = pack(STEPS, no_edits())
    counts = fields["counts"]
    assert packed.decodes == 2
    assert (counts[PREFILL_ITEMS], counts[DECODE_ITEMS]) == (1, 2)
    assert counts[list(LORA_ROWS)].tolist() == [4, 0, 4, 4]


@pytest.mark.parametrize("sampled", [True, False])
def test_second_lists_of_lora_hold_the_rows_that_are_sampled(sampled: bool) -> None:
    steps = (
        step(3, 20, (), 1, slot=1, sample=sampled),
        step(4, 0, (5, 6, 7), 3, slot=1, sample=False),
        step(5, 0, (5, 6), 2, slot=1, sample=sampled),
        step(6, 0, (7, 8, 9), 3, slot=2, sample=sampled),
        step(0, 16, (11,), 1, sample=sampled),
    )
    _, fields, shape, _ = pack(steps, no_edits(), max_running=8)
    assert shape.last_rows
    assert fields["counts"][LORA_ROWS[0]] == 9
    last = second(fields, LAST)
    counts = last["counts"]
    lengths = counts[LORA_ITEMS], counts[LORA_WORK]
    assert lengths == ((2, 3) if sampled else (0, 0))
    assert counts[list(LORA_ROWS)].tolist() == ([3, 0, 3, 3] if sampled else [0] * 4)
    items = [[0, 2, 1], [2, 1, 2]]  # first row, rows, slot
    work = [[0, 2, 1, 0, 0], [0, 2, 1, 1, 0], [2, 1, 2, 0, 1]]  # slot 1 has two rank blocks
    assert last["lora_items"][: lengths[0], :3].tolist() == items[: lengths[0]]
    assert last["lora_work"][: lengths[1], :5].tolist() == work[: lengths[1]]


def test_tail_holds_updates_then_edits() -> None:
    edits = np.array([[0, 5, 1, 0], [1, 6, 2, 0]], np.int32)
    packed, fields, _, _ = pack(STEPS, edits)
    assert (packed.updates, packed.edits) == (None, None)
    header, tail = fields["step"], fields["tail"]
    assert header[TABLE_UPDATES] == 2
    assert tail[:4].tolist() == [5 * BLOCKS, 40, 1, 42]
    assert (header[EDITS], header[EDITS_AT]) == (2, 4)
    assert tail[4:12].tolist() == edits.ravel().tolist()
    assert packed.tail == 12


@pytest.mark.parametrize("tail", [6, 2])
def test_what_has_no_room_in_the_tail_is_told(tail: int) -> None:
    edits = np.ones((1, 4), np.int32)
    packed, fields, _, _ = pack(STEPS, edits, tail=tail)
    assert packed.edits is edits or (packed.edits is None and fields["step"][EDITS] == 1)
    assert packed.updates is not None
    assert packed.updates.tolist() == [[5 * BLOCKS, 40], [1, 42]]
    assert fields["step"][TABLE_UPDATES] == 0
    assert packed.tail <= tail


def test_windows() -> None:
    """Where all layers see a window the one list is cut to it; where some do there are two."""
    lows = []
    for two in (False, True):
        _, fields, _, _ = pack(STEPS[:1], no_edits(), window=5, two_windows=two)
        lows.append(int(fields["decode_items"][0, 2]))
        if two:
            assert int(second(fields, WINDOWED)["decode_items"][0, 2]) == 16
    assert lows == [16, 0]

"""A plan as the device reads it: lists and tables packed into the fields of one array, once a step, on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from engine.plan import SequenceStep, StepPlan
from engine.worker.rows import Rows
from engine.worker.shapes import LAST, WINDOWED, Machine, StepShape, second
from engine.worker.staging import Ints
from kernels.attention_meta import pack_attention
from kernels.lora_meta import LORA_ROWS, LoraBounds, pack_lora
from kernels.step_meta import EDIT_INTS, EDITS, EDITS_AT, ROW, SAMPLES, TABLE_UPDATES, UPDATE_INTS

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """What the host still needs of a packed step."""

    firsts: Longs  # [sequences]: each one's first token in the batch
    steps: tuple[SequenceStep, ...]  # those that sample, in the order of the samples
    tail: int  # integers in use
    decodes: int  # sequences of one token
    lora_rows: tuple[int, ...] | None = None  # of each group of modules; None: nobody has an adapter
    updates: Ints | None = None  # [n, 2]: of the block tables, where the tail had no room for them
    edits: Ints | None = None  # [n, EDIT_INTS]: of the logits, likewise


class Packer:
    """Fills the fields of a shape from a plan; the rows' tables must know the plan's blocks."""

    def __init__(self, machine: Machine, rows: Rows, window: int) -> None:
        self._block = machine.kv.block_tokens
        self._rows = rows
        self._max_blocks = rows.block_table.shape[1]
        self._window = window  # of the layers that have one
        self._two_windows = machine.two_windows

    def pack(
        self,
        fields: Mapping[str, Ints],
        shape: StepShape,
        plan: StepPlan,
        slot_blocks: Ints,  # [slots, groups]: most rank blocks that the slot's adapter has in one of their modules
        samples: Ints,  # [sampled sequences, SAMPLE_INTS], but for ROW
        edits: Ints,  # [edits, EDIT_INTS]
    ) -> Packed:
        """Writes everything that the step's kernels read."""
        steps = plan.sequences
        rows, starts, lengths, slots, sampling = np.array(
            [(s.row, s.start, s.length, s.slot, s.sample) for s in steps], np.int64
        ).T
        firsts = np.cumsum(lengths) - lengths
        fields["counts"][:] = 0
        self._pack_tokens(fields, steps, rows, starts, lengths, firsts)
        self._pack_attention(fields, shape, rows, starts, lengths)
        if shape.lora:
            _pack_lora(fields, slots, lengths, slot_blocks, shape.lora_bounds)
        sampled = np.flatnonzero(sampling)
        if shape.lora and shape.last_rows:
            _pack_lora(second(fields, LAST), slots[sampled], np.ones_like(sampled), slot_blocks, shape.last_bounds)
        count = len(sampled)
        fields["samples"][:count] = samples
        fields["samples"][:count, ROW] = (firsts + lengths - 1)[sampled]
        tail, updates, more = self._pack_tail(fields, steps, count, edits)
        lora_rows = tuple(fields["counts"][list(LORA_ROWS)].tolist()) if shape.lora else None
        decodes = int(np.count_nonzero(lengths == 1))
        return Packed(firsts, tuple(steps[i] for i in sampled), tail, decodes, lora_rows, updates, more)

    def _pack_tokens(
        self,
        fields: Mapping[str, Ints],
        steps: Sequence[SequenceStep],
        rows: Longs,
        starts: Longs,
        lengths: Longs,
        firsts: Longs,
    ) -> None:
        count = int(lengths.sum())
        token_rows = np.repeat(rows, lengths)
        positions = np.arange(count) - np.repeat(firsts - starts, lengths)
        known = chain.from_iterable(s.tokens if s.tokens else (-1 - s.row,) for s in steps)
        fields["ids"][:count] = np.fromiter(known, np.int32, count)
        fields["positions"][:count] = positions
        chunks = self._rows.block_table[token_rows, positions // self._block]
        fields["locations"][:count] = chunks * self._block + positions % self._block
        fields["ids"][count:] = 0
        fields["positions"][count:] = 0
        fields["locations"][count:] = -1

    def _pack_attention(
        self, fields: Mapping[str, Ints], shape: StepShape, rows: Longs, starts: Longs, lengths: Longs
    ) -> None:
        given = rows.tolist(), starts.tolist(), lengths.tolist()
        first = 0 if self._two_windows else self._window
        pack_attention(dict(fields), shape.attention, *given, first)
        if self._two_windows:
            pack_attention(second(fields, WINDOWED), shape.attention, *given, self._window)

    def _pack_tail(
        self, fields: Mapping[str, Ints], steps: Sequence[SequenceStep], samples: int, edits: Ints
    ) -> tuple[int, Ints | None, Ints | None]:
        """(integers used, updates and edits that had no room)."""
        tail, header = fields["tail"], fields["step"]
        updates = self._updates(steps)
        rest, more = None, None
        if updates.size > len(tail) // 2:
            rest, updates = updates, updates[:0]
        if edits.size > len(tail) - updates.size:
            more, edits = edits, edits[:0]
        tail[: updates.size] = updates.ravel()
        tail[updates.size : updates.size + edits.size] = edits.ravel()
        header[TABLE_UPDATES], header[EDITS], header[EDITS_AT], header[SAMPLES] = (
            len(updates),
            len(edits),
            updates.size,
            samples,
        )
        return updates.size + edits.size, rest, more

    def _updates(self, steps: Sequence[SequenceStep]) -> Ints:
        """[blocks, UPDATE_INTS]: place in the flat block tables, chunk."""
        fresh = [s for s in steps if s.new_blocks]
        counts = np.array([len(s.new_blocks) for s in fresh], np.int64)
        firsts = np.array([s.row * self._max_blocks + s.first_new_block for s in fresh], np.int64)
        total = int(counts.sum())
        found = np.empty((total, UPDATE_INTS), np.int32)
        found[:, 0] = np.arange(total) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
        found[:, 1] = np.fromiter(chain.from_iterable(s.new_blocks for s in fresh), np.int32, total)
        return found


def no_edits() -> Ints:
    return np.empty((0, EDIT_INTS), np.int32)


def _pack_lora(fields: Mapping[str, Ints], slots: Longs, tokens: Longs, slot_blocks: Ints, bounds: LoraBounds) -> None:
    """slots, tokens: of each sequence in the batch's order; the base (-1) comes last and is left out."""
    count = int(np.count_nonzero(slots >= 0))
    starts = np.flatnonzero(np.diff(slots[:count], prepend=-1))
    groups = np.stack([slots[starts], np.add.reduceat(tokens[:count], starts)], 1)
    pack_lora(fields, groups, slot_blocks, bounds.tile)

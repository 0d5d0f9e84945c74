"""What a plan becomes: the tensors of one step, in the plan's order. Built once a step, read by all layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import SequenceStep, StepPlan
from engine.worker.rows import Rows


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's tokens in the batch."""

    sequence_id: int
    row: int
    first: int  # index of its first token in the batch
    length: int
    start: int  # position of its first token in the sequence

    @property
    def context(self) -> int:
        """Tokens it attends to, its own of this step among them."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Neighbouring tokens of one adapter, or of the base (None)."""

    adapter_id: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input."""

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    token_rows: NDArray[np.int64]  # [tokens]: state row of each token
    spans: tuple[Span, ...]  # aligned with the plan's sequences
    runs: tuple[AdapterRun, ...]
    block_table: NDArray[np.int64]  # [max_running, max_blocks], the rows' own
    fresh_chunks: tuple[int, ...]  # blocks that hold nothing yet


def make_batch(plan: StepPlan, rows: Rows, block_tokens: int, device: torch.device) -> Batch:
    """Fills the batch; the rows' tables must already know the plan's blocks."""
    lengths = np.array([s.length for s in plan.sequences], np.int64)
    starts = np.array([s.start for s in plan.sequences], np.int64)
    firsts = np.cumsum(lengths) - lengths
    token_rows = np.repeat(np.array([s.row for s in plan.sequences], np.int64), lengths)
    positions = np.arange(lengths.sum()) - np.repeat(firsts - starts, lengths)
    return Batch(
        ids=_ids(plan, rows, token_rows, firsts, device),
        positions=torch.from_numpy(positions).to(device),
        token_rows=token_rows,
        spans=tuple(
            Span(s.sequence_id, s.row, first, s.length, s.start)
            for s, first in zip(plan.sequences, firsts.tolist(), strict=True)
        ),
        runs=tuple(_runs(plan, firsts)),
        block_table=rows.block_table,
        fresh_chunks=tuple(chunk for s in plan.sequences for chunk in _fresh(s, block_tokens)),
    )


def _ids(
    plan: StepPlan, rows: Rows, token_rows: NDArray[np.int64], firsts: NDArray[np.int64], device: torch.device
) -> Tensor:
    """Token ids; where the host does not know one it is the row's last sampled token."""
    ids = np.zeros(len(token_rows), np.int64)
    unknown = []
    for step, first in zip(plan.sequences, firsts.tolist(), strict=True):
        if step.tokens:
            ids[first : first + step.length] = step.tokens
        else:
            unknown.append(first)
    tensor = torch.from_numpy(ids).to(device)
    if unknown:
        places = torch.tensor(unknown, device=device)
        tensor[places] = rows.last_token[torch.from_numpy(token_rows[unknown]).to(device)]
    return tensor


def _runs(plan: StepPlan, firsts: NDArray[np.int64]) -> Iterator[AdapterRun]:
    for slot, group in groupby(zip(plan.sequences, firsts.tolist(), strict=True), key=lambda pair: pair[0].slot):
        members = list(group)
        last, first = members[-1]
        yield AdapterRun(None if slot < 0 else plan.slots[slot], members[0][1], first + last.length)


def _fresh(step: SequenceStep, block_tokens: int) -> Iterator[int]:
    """New blocks that start at or behind the step's first token; those before it came from the prefix cache."""
    for index, chunk in enumerate(step.new_blocks, step.first_new_block):
        if index * block_tokens >= step.start:
            yield chunk

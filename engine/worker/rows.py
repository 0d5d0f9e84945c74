"""State rows: what a rank remembers of each running sequence between steps. Owned by the runner.

A row belongs to a sequence from its admission until the row is admitted again; the brain hands rows out.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Admission, SequenceStep
from engine.types import SamplingParams


@dataclass(slots=True)
class RowState:
    """The host's part of one row."""

    sequence_id: int
    tokens: tuple[int, ...]  # known at admission
    prompt_length: int
    choice: int
    params: SamplingParams


@dataclass(slots=True)
class Rows:
    """Tables of static size over all rows."""

    block_table: NDArray[np.int64]  # [max_running, max_blocks]: chunk of each block
    last_token: Tensor  # [max_running] int64, on the device: sampled last
    states: dict[int, RowState] = field(default_factory=dict)

    def admit(self, admission: Admission) -> None:
        """The row starts afresh."""
        self.states[admission.row] = RowState(
            admission.sequence_id, admission.tokens, admission.prompt_length, admission.choice, admission.params
        )

    def extend(self, step: SequenceStep) -> None:
        """New blocks join the row's table."""
        if step.new_blocks:
            end = step.first_new_block + len(step.new_blocks)
            self.block_table[step.row, step.first_new_block : end] = step.new_blocks


def make_rows(max_running: int, max_blocks: int, device: torch.device) -> Rows:
    return Rows(
        block_table=np.zeros((max_running, max_blocks), np.int64),
        last_token=torch.zeros(max_running, dtype=torch.int64, device=device),
    )

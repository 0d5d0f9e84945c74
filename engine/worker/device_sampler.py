"""Sampling on the device: each row's settings as integers of the step's packed array, and what is kept between steps.

A token depends on its own row alone. All steps take the same three launches, which a graph can hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admission, SequenceStep
from engine.types import SamplingParams
from engine.worker.accelerator import Accelerator
from engine.worker.device_batch import no_edits
from engine.worker.noise import uniform
from engine.worker.rows import Rows
from engine.worker.sampler import has_penalties
from engine.worker.staging import Ints
from kernels import step_meta
from kernels.sample import edit, penalize, sample

BANNED = float("-inf")
MOST_TOP_K = 1 << 30
NOISE_SCALE = 1 << (2 * step_meta.NOISE_BITS)
NOISE_MASK = (1 << step_meta.NOISE_BITS) - 1


@dataclass(frozen=True, slots=True)
class RowEdits:
    """What is added to a row's logits, by token."""

    usual: Ints  # [edits, EDIT_INTS], but for the sample
    early: Ints  # the same while stops are banned


@dataclass(frozen=True, slots=True)
class SampleTensors:
    """What one shape's steps read from the device."""

    step: Tensor  # [STEP_INTS] int32
    samples: Tensor  # [sequences, SAMPLE_INTS] int32
    tail: Tensor  # [any] int32


class DeviceSampler:
    """Rows' settings on the host, logits and counts on the device."""

    def __init__(
        self, rows: Rows, max_running: int, samples: int, vocab: int, eos: Sequence[int], accelerator: Accelerator
    ) -> None:
        device = accelerator.device
        self.logits = torch.zeros(samples, vocab, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(samples, dtype=torch.int32, device=device)
        self._forced = torch.full((samples,), -1, dtype=torch.int32, device=device)
        self._tally = torch.zeros(max_running, vocab, dtype=torch.int32, device=device)
        self._rows = rows
        self._vocab = vocab
        self._eos = tuple(token for token in eos if token < vocab)
        self._accelerator = accelerator
        self._lines = np.zeros((max_running, step_meta.SAMPLE_INTS), np.int32)
        self._edits: dict[int, RowEdits] = {}
        self._any_forced = False

    def admit(self, admission: Admission) -> None:
        """The row starts afresh."""
        params, row = admission.params, admission.row
        self._lines[row] = _line(row, params)
        self._edits[row] = _row_edits(params, self._eos, self._vocab)
        if has_penalties(params):
            self._count(row, admission)

    def lines(self, steps: Sequence[SequenceStep]) -> Ints:
        """[samples, SAMPLE_INTS], but for the rows of the hidden states."""
        lines = self._lines[[s.row for s in steps]]
        for index, step in enumerate(steps):
            state = self._rows.states[step.row]
            if state.params.temperature > 0:
                noise = int(uniform(state.params.seed, state.choice, step.output_index) * NOISE_SCALE)
                lines[index, step_meta.NOISE_HIGH] = noise >> step_meta.NOISE_BITS
                lines[index, step_meta.NOISE_LOW] = noise & NOISE_MASK
        return lines

    def edits(self, steps: Sequence[SequenceStep]) -> Ints:
        """[edits, EDIT_INTS] of all samples."""
        found = []
        for index, step in enumerate(steps):
            row = self._edits[step.row]
            edits = row.early if step.ban_stops else row.usual
            if len(edits):
                found.append(edits.copy())
                found[-1][:, 0] = index
        return np.concatenate(found) if found else no_edits()

    def force(self, steps: Sequence[SequenceStep], force: Mapping[int, int] | None) -> None:
        """The next step's tokens of these sequences are these, whatever the logits say."""
        if not force and not self._any_forced:
            return
        wanted = np.full(self._forced.shape, -1, np.int32)
        for index, step in enumerate(steps):
            wanted[index] = (force or {}).get(step.sequence_id, -1)
        self._forced.copy_(self._accelerator.upload(wanted))
        self._any_forced = bool(force)

    def launch(self, tensors: SampleTensors, samples: int) -> None:
        """Penalties, edits, tokens, from `logits` to `tokens`."""
        self.launch_edits(tensors, samples)
        self.launch_draw(tensors, samples)

    def launch_edits(self, tensors: SampleTensors, samples: int) -> None:
        penalize(self.logits[:samples], self._tally, tensors.step, tensors.samples[:samples])
        edit(self.logits[:samples], tensors.step, tensors.tail)

    def launch_draw(self, tensors: SampleTensors, samples: int) -> None:
        sample(
            self.tokens[:samples],
            self._rows.last_token,
            self._tally,
            self.logits[:samples],
            self._forced[:samples],
            tensors.step,
            tensors.samples[:samples],
        )

    def mask(self, steps: Sequence[SequenceStep], masks: Mapping[int, Tensor], more: Ints | None) -> None:
        """What no graph holds: masks of whole rows, and edits that had no room in the step's array."""
        for index, step in enumerate(steps):
            if (mask := masks.get(step.sequence_id)) is not None:
                self.logits[index].masked_fill_(~mask.to(self.logits.device, non_blocking=True), BANNED)
        if more is not None:
            places = self._accelerator.upload(more[:, :2].astype(np.int64))
            values = self._accelerator.upload(more[:, 2].copy().view(np.float32))
            self.logits.index_put_((places[:, 0], places[:, 1]), values, accumulate=True)

    def _count(self, row: int, admission: Admission) -> None:
        """Counts the tokens that a sequence comes with."""
        tally = self._tally[row]
        tally.zero_()
        tokens = self._accelerator.upload(np.array(admission.tokens, np.int64))
        prompt, output = tokens[: admission.prompt_length], tokens[admission.prompt_length :]
        tally[prompt] = 1
        tally.scatter_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))


def _line(row: int, params: SamplingParams) -> Ints:
    line = np.zeros(step_meta.SAMPLE_INTS, np.int32)
    line[step_meta.STATE] = row
    line[step_meta.TOP_K] = min(params.top_k, MOST_TOP_K)
    line[step_meta.PENALIZED] = has_penalties(params)
    floats = {
        step_meta.TEMPERATURE: params.temperature,
        step_meta.TOP_P: params.top_p,
        step_meta.MIN_P: params.min_p,
        step_meta.REPETITION: params.repetition_penalty,
        step_meta.FREQUENCY: params.frequency_penalty,
        step_meta.PRESENCE: params.presence_penalty,
    }
    line[list(floats)] = step_meta.bits(list(floats.values()))
    return line


def _row_edits(params: SamplingParams, eos: Sequence[int], vocab: int) -> RowEdits:
    bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < vocab}
    stops = {token: BANNED for token in (*eos, *params.stop_token_ids) if 0 <= token < vocab}
    return RowEdits(_edits(bias), _edits(bias | stops))


def _edits(added: Mapping[int, float]) -> Ints:
    edits = np.zeros((len(added), step_meta.EDIT_INTS), np.int32)
    edits[:, 1] = list(added)
    edits[:, 2] = step_meta.bits(list(added.values()))
    return edits

"""From logits to tokens, with the state that sampling keeps between steps. Owned by the runner, one for each rank.

Everything a row needs is in its own state and its own logits: a token never depends on the rest of the batch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admission, SequenceStep
from engine.types import SamplingParams
from engine.worker.draw import DrawParams, draw
from engine.worker.noise import uniform
from engine.worker.rows import Rows, RowState
from engine.worker.search import argmax


class Sampler:
    """Samples the rows of a step. Counts for penalties are made when the first request asks for them."""

    def __init__(self, rows: Rows, max_running: int, vocab: int, eos: Sequence[int], device: torch.device) -> None:
        self._rows = rows
        self._max_running = max_running
        self._vocab = vocab
        self._eos = tuple(token for token in eos if token < vocab)
        self._device = device
        self._counts: Tensor | None = None  # [max_running, vocab] int32: of the output
        self._seen: Tensor | None = None  # [max_running, vocab] bool: in prompt or output

    def admit(self, admission: Admission) -> None:
        """Resets the row's counts."""
        if not has_penalties(admission.params):
            return
        counts, seen = self._tables()
        tokens = torch.tensor(admission.tokens, device=self._device)
        counts[admission.row] = tokens[admission.prompt_length :].bincount(minlength=self._vocab)[: self._vocab]
        seen[admission.row] = False
        seen[admission.row, tokens] = True

    def sample(
        self,
        steps: Sequence[SequenceStep],
        logits: Tensor,
        masks: Mapping[int, Tensor] | None,
        force: Mapping[int, int] | None,
    ) -> Tensor:
        """[rows, vocab] float32 (changed in place) -> [rows] int64, which also become the rows' last tokens."""
        states = [self._rows.states[step.row] for step in steps]
        self._edit(steps, states, logits, masks or {})
        tokens = self._choose(steps, states, logits)
        for index, step in enumerate(steps):
            if force and step.sequence_id in force:
                tokens[index] = force[step.sequence_id]
        self._record(steps, states, tokens)
        return tokens

    def _choose(self, steps: Sequence[SequenceStep], states: Sequence[RowState], logits: Tensor) -> Tensor:
        tokens = argmax(logits)
        random = [i for i, state in enumerate(states) if np.float32(state.params.temperature) > 0]  # 1e-50 is 0
        if random:
            index = torch.tensor(random, device=self._device)
            params = self._draw_params([steps[i] for i in random], [states[i] for i in random])
            tokens[index] = draw(logits if len(random) == len(steps) else logits[index], params)
        return tokens

    def _draw_params(self, steps: Sequence[SequenceStep], states: Sequence[RowState]) -> DrawParams:
        params = [state.params for state in states]
        noise = [uniform(s.params.seed, s.choice, step.output_index) for s, step in zip(states, steps, strict=True)]
        return DrawParams(
            temperature=self._tensor([p.temperature for p in params], np.float32),
            top_k=self._tensor([p.top_k for p in params], np.int64),
            top_p=self._tensor([p.top_p for p in params], np.float32),
            min_p=self._tensor([p.min_p for p in params], np.float32),
            uniform=self._tensor(noise, np.float64),
        )

    def _edit(
        self,
        steps: Sequence[SequenceStep],
        states: Sequence[RowState],
        logits: Tensor,
        masks: Mapping[int, Tensor],
    ) -> None:
        """Penalties, then the request's bias, then what may not be sampled at all."""
        self._penalize(steps, states, logits)
        for index, (step, state) in enumerate(zip(steps, states, strict=True)):
            if state.params.logit_bias:
                ids = torch.tensor(list(state.params.logit_bias), device=self._device)
                logits[index, ids] += torch.tensor(list(state.params.logit_bias.values()), device=self._device)
            if step.ban_stops:
                logits[index, [*self._eos, *state.params.stop_token_ids]] = float("-inf")
            if (mask := masks.get(step.sequence_id)) is not None:
                logits[index].masked_fill_(~mask, float("-inf"))

    def _penalize(self, steps: Sequence[SequenceStep], states: Sequence[RowState], logits: Tensor) -> None:
        chosen = [i for i, state in enumerate(states) if has_penalties(state.params)]
        if not chosen:
            return
        index, rows = torch.tensor(chosen), torch.tensor([steps[i].row for i in chosen])
        params = [states[i].params for i in chosen]
        counts, seen = (table[rows] for table in self._tables())
        repetition = self._tensor([p.repetition_penalty for p in params], np.float32)[:, None]
        frequency = self._tensor([p.frequency_penalty for p in params], np.float32)[:, None]
        presence = self._tensor([p.presence_penalty for p in params], np.float32)[:, None]
        values = logits[index]
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(seen, repeated, values)
        logits[index] = values - frequency * counts - presence * (counts > 0)

    def _record(self, steps: Sequence[SequenceStep], states: Sequence[RowState], tokens: Tensor) -> None:
        """Last tokens and counts, for the next step."""
        rows = torch.tensor([step.row for step in steps], device=self._device)
        self._rows.last_token[rows] = tokens
        chosen = [i for i, state in enumerate(states) if has_penalties(state.params)]
        if chosen:
            counts, seen = self._tables()
            at = rows[chosen], tokens[chosen]
            counts[at] += 1  # one token a row, so no place is met twice
            seen[at] = True

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._seen is None:
            shape = (self._max_running, self._vocab)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._counts, self._seen

    def _tensor(self, values: Sequence[float], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype)).to(self._device)


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)

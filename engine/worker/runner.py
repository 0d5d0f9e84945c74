"""Runs steps on one device: plan to batch, batch to hidden states, hidden states to tokens. Used by one step thread."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.attention import TorchAttention
from engine.models.decoder import Decoder
from engine.plan import SequenceStep, StepPlan, StepResult
from engine.types import TokenLogprob
from engine.worker.batch import Batch, Span, make_batch
from engine.worker.logprobs import token_logprobs
from engine.worker.lora import LoraChooser
from engine.worker.results import sequence_result
from engine.worker.rows import Rows
from engine.worker.sampler import Sampler

HEAD_ROWS = 64  # rows of logits held at once


@dataclass(frozen=True, slots=True)
class Forward:
    """What `forward` leaves for `sample`."""

    batch: Batch
    hidden: Tensor  # [tokens, hidden], before the last norm
    started: float  # time.perf_counter() at launch


class Pending:
    """A step that was launched; `result` waits for it."""

    def __init__(self, collect: Callable[[], StepResult]) -> None:
        self._collect = collect
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Blocks until the device is done."""
        if self._result is None:
            self._result = self._collect()
        return self._result


class Runner:
    """The device's side of a step. `forward` and `sample` alternate."""

    graph_replays = 0  # nothing is captured on this path

    def __init__(
        self,
        decoder: Decoder,
        attention: TorchAttention,
        chooser: LoraChooser,
        rows: Rows,
        sampler: Sampler,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._chooser = chooser
        self._rows = rows
        self._sampler = sampler
        self._block_tokens = block_tokens
        self._device = device
        self._forward: Forward | None = None

    def forward(self, plan: StepPlan) -> None:
        """Launches the layers of all the plan's tokens."""
        started = time.perf_counter()
        for admission in plan.admissions:
            self._rows.admit(admission)
            self._sampler.admit(admission)
        for step in plan.sequences:
            self._rows.extend(step)
        batch = make_batch(plan, self._rows, self._block_tokens, self._device)
        self._attention.begin(batch)
        hidden = self._decoder.forward(batch.ids, self._attention, self._chooser.choose(batch))
        self._attention.finish()
        self._forward = Forward(batch, hidden, started)

    def sample(
        self, plan: StepPlan, masks: Mapping[int, Tensor] | None = None, force: Mapping[int, int] | None = None
    ) -> Pending:
        """Launches the sampling of the sequences that ask for it. `masks`: [vocab] bool of what is allowed."""
        forward = self._forward
        if forward is None:
            raise RuntimeError("sample without forward")
        self._forward = None
        steps = [step for step in plan.sequences if step.sample]
        spans = [span for step, span in zip(plan.sequences, forward.batch.spans, strict=True) if step.sample]
        tokens, logprobs = self._sample(steps, spans, forward.hidden, masks, force)
        prompts = {s.row: lp for s, lp in self._prompt_logprobs(plan, forward)}

        def collect() -> StepResult:
            ids = dict(zip((step.row for step in steps), tokens.tolist(), strict=True))
            results = [sequence_result(step, ids, logprobs, prompts) for step in plan.sequences]
            return StepResult(plan.step, results, time.perf_counter() - forward.started)

        return Pending(collect)

    def _sample(
        self,
        steps: list[SequenceStep],
        spans: list[Span],
        hidden: Tensor,
        masks: Mapping[int, Tensor] | None,
        force: Mapping[int, int] | None,
    ) -> tuple[Tensor, dict[int, TokenLogprob]]:
        """Tokens, [sampled sequences] int64, and log-probabilities by row."""
        tokens, logprobs = [torch.empty(0, dtype=torch.int64)], dict[int, TokenLogprob]()
        for first in range(0, len(steps), HEAD_ROWS):
            some = steps[first : first + HEAD_ROWS]
            last = torch.tensor([s.first + s.length - 1 for s in spans[first : first + HEAD_ROWS]], device=self._device)
            logits = self._decoder.logits(hidden.index_select(0, last))
            asked = [i for i, step in enumerate(some) if self._rows.states[step.row].params.logprobs is not None]
            own = logits[asked].clone() if asked else None  # before the sampler edits them
            tokens.append(self._sampler.sample(some, logits, masks, force))
            if own is not None:
                logprobs |= self._logprobs([some[i] for i in asked], own, tokens[-1][asked].tolist())
        return torch.cat(tokens), logprobs

    def _logprobs(self, steps: list[SequenceStep], logits: Tensor, tokens: list[int]) -> dict[int, TokenLogprob]:
        alternatives = [self._rows.states[step.row].params.logprobs or 0 for step in steps]
        found = token_logprobs(logits, tokens, alternatives)
        return dict(zip((step.row for step in steps), found, strict=True))

    def _prompt_logprobs(self, plan: StepPlan, forward: Forward) -> Iterator[tuple[SequenceStep, list[TokenLogprob]]]:
        for step, span in zip(plan.sequences, forward.batch.spans, strict=True):
            if step.prompt_logprobs:
                yield step, self._prompt_part(step, span, forward.hidden)

    def _prompt_part(self, step: SequenceStep, span: Span, hidden: Tensor) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens that follow this step's."""
        state = self._rows.states[step.row]
        targets = state.tokens[span.start + 1 : min(span.context + 1, state.prompt_length)]
        found: list[TokenLogprob] = []
        for first in range(0, len(targets), HEAD_ROWS):
            some = targets[first : first + HEAD_ROWS]
            rows = hidden[span.first + first : span.first + first + len(some)]
            top = [state.params.prompt_logprobs or 0] * len(some)
            found += token_logprobs(self._decoder.logits(rows), some, top)
        return found

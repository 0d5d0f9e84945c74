"""Takes a step's results in: tokens, stops, log-probabilities, blocks for the prefix cache. Called by the scheduler."""

from engine.blocks import Blocks
from engine.draft import Flight
from engine.messages import SequenceOutput
from engine.plan import SequenceResult, SequenceStep, StepResult
from engine.roster import Roster
from engine.sequence import Sequence, SequenceState
from engine.stats import Recorder
from engine.types import FinishReason, TokenLogprob


class Committer:
    """Steps are committed in the order in which they were planned."""

    def __init__(self, blocks: Blocks, roster: Roster, recorder: Recorder) -> None:
        self._blocks = blocks
        self._roster = roster
        self._count = recorder.counters

    def commit(self, flight: Flight, result: StepResult) -> list[SequenceOutput]:
        """What the gateway is told; a row of a sequence that has ended is discarded."""
        outputs = []
        for (sequence, admission), row, told in zip(
            flight.sequences, flight.plan.sequences, result.results, strict=True
        ):
            if sequence.state is SequenceState.ENDED:
                self._count["discarded_rows"] += 1
            elif (output := self._take(sequence, admission, row, told)) is not None:
                outputs.append(output)
        return outputs

    def _take(
        self, sequence: Sequence, admission: int, row: SequenceStep, told: SequenceResult
    ) -> SequenceOutput | None:
        sequence.pending -= row.sample
        prompt_logprobs = _prompt_logprobs(sequence, row, told) if row.prompt_logprobs else None
        tokens, finish = self._append(sequence, told.tokens)
        self._roster.generated(sequence.adapter, len(tokens))
        end = row.start + row.length
        if sequence.params.max_tokens == 0 and end == sequence.prompt_length:
            finish = FinishReason.LENGTH
        current = sequence.state is SequenceState.RUNNING and sequence.admission == admission
        if current:
            self._note_computed(sequence, end)
        if end >= sequence.prompt_length and not sequence.request.prompt_done:
            shared = (sequence.prompt_length - 1) // self._blocks.block_tokens
            self._roster.prompt_done(sequence.request, sequence if current else None, shared)
        if finish is not None:
            self._count[f"finished_{finish.value}"] += 1
            self._roster.end(sequence)
        if not tokens and finish is None and prompt_logprobs is None:
            return None
        return _output(sequence, tokens, finish, told, prompt_logprobs)

    def _append(self, sequence: Sequence, sampled: list[int]) -> tuple[list[int], FinishReason | None]:
        """The tokens that count, up to the one that ends the sequence, and how it ends."""
        params = sequence.params
        for index, token in enumerate(sampled):
            sequence.tokens.append(token)
            generated = len(sequence.tokens) - sequence.prompt_length
            if token in sequence.request.stops and generated > params.min_tokens:
                return sampled[: index + 1], FinishReason.STOP
            if generated >= params.max_tokens:
                return sampled[: index + 1], FinishReason.LENGTH
        return sampled, None

    def _note_computed(self, sequence: Sequence, end: int) -> None:
        """The KV below `end` is committed: full blocks of it can be found by others."""
        full = end // self._blocks.block_tokens
        if full > sequence.hashed:
            self._blocks.register(sequence.chain, sequence.tokens, sequence.blocks, sequence.hashed, full)
            sequence.hashed = full


def _prompt_logprobs(sequence: Sequence, row: SequenceStep, told: SequenceResult) -> list[TokenLogprob | None] | None:
    """Those that were not passed on yet: a preempted sequence computes positions again."""
    first = row.start + 1
    values = (told.prompt_logprobs or [])[: sequence.prompt_length - first]
    news: list[TokenLogprob | None] = []
    if sequence.reported == 0:
        news.append(None)
        sequence.reported = 1
    news += values[sequence.reported - first :]
    sequence.reported = max(sequence.reported, first + len(values))
    return news or None


def _output(
    sequence: Sequence,
    tokens: list[int],
    finish: FinishReason | None,
    told: SequenceResult,
    prompt_logprobs: list[TokenLogprob | None] | None,
) -> SequenceOutput:
    request, first = sequence.request, sequence.first_output
    sequence.first_output = False
    return SequenceOutput(
        request_id=request.submit.request_id,
        choice=sequence.choice,
        tokens=tokens,
        finish=finish,
        stop_token=tokens[-1] if finish is FinishReason.STOP else None,
        logprobs=None if told.logprobs is None else told.logprobs[: len(tokens)],
        prompt_logprobs=prompt_logprobs,
        cached_tokens=request.cached_tokens if first else 0,
    )

"""What one step does, decided by the scheduler alone and carried out by every rank. Immutable, and free of torch."""

from collections import Counter
from dataclasses import dataclass

import msgspec

from engine.types import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Copy an adapter's host pages into these chunks, page i to chunks[i]; nothing refers to the chunks any more."""

    adapter_id: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a state row: the worker resets the row's sampler state.

    `tokens` are all tokens known so far, the first `prompt_length` of them the prompt; a preempted sequence comes
    back with what it had generated.
    """

    row: int
    sequence_id: int
    tokens: tuple[int, ...]
    prompt_length: int
    choice: int
    params: SamplingParams


class SequenceStep(msgspec.Struct, frozen=True):
    """One sequence's part of the step: `length` tokens from position `start` on.

    `tokens` holds their ids; it is empty when the single token is the one that the step before sampled into the
    sequence's state row and the host does not know it yet. Blocks of the row's table that are new since the row's
    last step stand in `new_blocks`, from index `first_new_block` on (admission starts the table afresh at 0).
    """

    row: int
    sequence_id: int
    slot: int  # -1: the base
    start: int
    length: int
    tokens: tuple[int, ...]
    first_new_block: int
    new_blocks: tuple[int, ...]  # chunk ids
    sample: bool  # the last token's logits become a token
    output_index: int  # how many tokens the sequence has generated before the one sampled here
    ban_stops: bool  # min_tokens not reached: end and stop tokens must not be sampled
    prompt_logprobs: bool = False  # this step's prompt positions report their log-probabilities


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `sequences` are ordered by slot, the base last, decodes before prefills within a slot."""

    step: int  # counts from 1
    slots: tuple[int | None, ...]  # adapter_id in each slot during this step
    loads: tuple[AdapterLoad, ...] = ()
    admissions: tuple[Admission, ...] = ()
    sequences: tuple[SequenceStep, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(sequence.length for sequence in self.sequences)

    def adapted_rows(self) -> Counter[int]:
        """Slot -> tokens of its adapter, for the slots that have some."""
        rows = Counter[int]()
        for sequence in self.sequences:
            if sequence.slot >= 0:
                rows[sequence.slot] += sequence.length
        return rows


class SequenceResult(msgspec.Struct, frozen=True):
    """What a step gave one sequence; `tokens` is empty where nothing was sampled."""

    tokens: list[int] = []  # made anew for each
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # log-probability of tokens start+1 .. start+length of the prompt


@dataclass(frozen=True, slots=True)
class StepResult:
    """Aligned with the plan's `sequences`."""

    step: int
    results: list[SequenceResult]
    seconds: float  # from launch to result

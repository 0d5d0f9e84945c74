"""Chooses, once a step, how the batch's adapters reach the products. Every choice gives the same numbers.

A stack of several adapters takes two products whatever the batch, but multiplies every token with every adapter; going
adapter by adapter multiplies each token with its own, in more and smaller products. What is cheaper is estimated. A
stack is built off the step's path once the same adapters were wanted in several steps.
"""

from engine.adapters.bank import AdapterBank
from engine.layers.lora import (
    AdapterSet,
    BaseOnly,
    LoraPath,
    Segment,
    SegmentedLora,
    StackedLora,
    owner_of_tokens,
)
from engine.worker.batch import AdapterRun, Batch

# Nanoseconds on two cores with AVX512-BF16; only how they relate matters.
READ_ELEMENT = 0.07  # a weight that is read once
MULTIPLY_ELEMENT = 0.006  # a weight times one token
SEGMENT_CALLS = 180_000.0  # the calls of one segment in one layer: up to eight products and four copies
WANTED_STEPS = 2  # steps in which the same adapters must be wanted before a stack of them is built


class LoraChooser:
    """Makes the path of each step; keeps count of what it chose, for tests and metrics."""

    def __init__(self, bank: AdapterBank, use_stack: bool) -> None:
        self._bank = bank
        self._use_stack = use_stack
        self._wanted: tuple[int, ...] = ()
        self._wanted_steps = 0
        self.counts = {"base": 0, "stacked": 0, "segmented": 0}

    def choose(self, batch: Batch) -> LoraPath:
        segments = [
            Segment(run.start, run.end, self._bank.get(run.adapter_id))
            for run in batch.runs
            if run.adapter_id is not None
        ]
        if not segments:
            self.counts["base"] += 1
            return BaseOnly()
        stack = self._stack(segments, len(batch.ids)) if self._use_stack else None
        if stack is None:
            self.counts["segmented"] += 1
            return SegmentedLora(segments)
        self.counts["stacked"] += 1
        return _stacked(stack, batch.runs)

    def _stack(self, segments: list[Segment], tokens: int) -> AdapterSet | None:
        """The stack where it covers the batch and is the cheaper way; asks for a better one where that would be."""
        limit, stack = segmented_cost(segments), self._bank.stack()
        wanted = tuple(sorted(segment.adapter.adapter_ids[0] for segment in segments))
        if stack is not None and set(wanted) <= set(stack.adapter_ids) and cost(stack.elements, tokens) <= limit:
            return stack
        if cost(sum(segment.adapter.elements for segment in segments), tokens) <= limit:
            self._want(wanted)
        return None

    def _want(self, wanted: tuple[int, ...]) -> None:
        self._wanted_steps = self._wanted_steps + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        if self._wanted_steps >= WANTED_STEPS:
            self._bank.request_stack(wanted)


def cost(elements: int, tokens: int) -> float:
    """Nanoseconds to multiply so many weights with so many tokens: bound by reading them or by multiplying."""
    return elements * max(READ_ELEMENT, MULTIPLY_ELEMENT * tokens)


def segmented_cost(segments: list[Segment]) -> float:
    """Nanoseconds of going adapter by adapter."""
    calls = SEGMENT_CALLS * sum(len(segment.adapter.pairs) for segment in segments)
    return calls + sum(cost(segment.adapter.elements, segment.end - segment.start) for segment in segments)


def _stacked(stack: AdapterSet, runs: tuple[AdapterRun, ...]) -> LoraPath:
    owners = owner_of_tokens([run.adapter_id for run in runs], [run.end - run.start for run in runs], stack)
    return StackedLora(stack, owners)

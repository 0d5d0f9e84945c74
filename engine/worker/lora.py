"""Chooses, once a step, how the batch's adapters reach the products. Every choice gives the same numbers.

A stack of all the batch's adapters is the fastest at decode: two products whatever the batch. It is built off the
step's path once the same adapters were wanted in several steps; until then, for long prompts, and where the stack would
carry many ranks that nobody uses, the batch goes adapter by adapter.
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

STACK_TOKENS = 64  # beyond this many tokens in a step, work on foreign ranks costs more than the calls it saves
STACK_EXCESS = 2.0  # a stack may carry this many times the ranks that the batch's adapters have
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
        runs = [run for run in batch.runs if run.adapter_id is not None]
        if not runs:
            self.counts["base"] += 1
            return BaseOnly()
        stack = self._stack(tuple(sorted({run.adapter_id for run in runs if run.adapter_id is not None})), batch)
        if stack is not None:
            self.counts["stacked"] += 1
            return self._stacked(stack, batch.runs)
        self.counts["segmented"] += 1
        return SegmentedLora([Segment(r.start, r.end, self._bank.get(r.adapter_id)) for r in runs if r.adapter_id])

    def _stacked(self, stack: AdapterSet, runs: tuple[AdapterRun, ...]) -> LoraPath:
        owners = owner_of_tokens([run.adapter_id for run in runs], [run.end - run.start for run in runs], stack)
        return StackedLora(stack, owners)

    def _stack(self, wanted: tuple[int, ...], batch: Batch) -> AdapterSet | None:
        """The stack where it covers the batch and is worth its while."""
        if not self._use_stack or len(batch.ids) > STACK_TOKENS:
            return None
        stack = self._bank.stack()
        if stack is not None and set(wanted) <= set(stack.adapter_ids) and not self._wasteful(stack, wanted):
            return stack
        self._want(wanted)
        return None

    def _wasteful(self, stack: AdapterSet, wanted: tuple[int, ...]) -> bool:
        if len(wanted) == len(stack.adapter_ids):
            return False
        return stack.ranks > STACK_EXCESS * sum(self._bank.get(adapter_id).ranks for adapter_id in wanted)

    def _want(self, wanted: tuple[int, ...]) -> None:
        self._wanted_steps = self._wanted_steps + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        if self._wanted_steps >= WANTED_STEPS:
            self._bank.request_stack(wanted)

"""Runs plans on the device: one thread launches steps, another waits for their results, in order.

The loop hands a plan over and gets a future; it may hand over the next one while the first still runs.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepPlan, StepResult
from engine.worker.breaks import Breaks


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Blocks until the device has finished the step."""


class StepWorker(Protocol):
    """The part of rank 0's worker that runs steps; both calls come from the launch thread."""

    @property
    def graph_replays(self) -> int: ...

    def forward(self, plan: StepPlan) -> None: ...

    def sample(self, plan: StepPlan) -> Pending: ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way."""

    plan: StepPlan
    result: "asyncio.Future[StepResult]"
    launched: float  # loop time


def step_thread() -> ThreadPoolExecutor:
    """The thread that loads the weights and launches every step."""
    return ThreadPoolExecutor(1, thread_name_prefix="step")


class Pipeline:
    """At most `depth` steps are on their way at once; the loop keeps to that. `launcher` is `step_thread()`."""

    def __init__(self, worker: StepWorker, launcher: ThreadPoolExecutor, breaks: Breaks) -> None:
        self._worker = worker
        self._breaks = breaks
        self._launcher = launcher
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="collect")

    @property
    def graph_replays(self) -> int:
        """Steps whose layers ran as a captured graph."""
        return self._worker.graph_replays

    def launch(self, plan: StepPlan) -> Flight:
        """Starts a step behind those already launched. A plan without sequences is done at once."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[StepResult]
        if plan.sequences:
            pending = self._launcher.submit(self._run, plan)
            result = loop.run_in_executor(self._collector, lambda: pending.result().result())
            result.add_done_callback(_note_failure)
        else:
            result = loop.create_future()
            result.set_result(StepResult(plan.step, [], 0.0))
        return Flight(plan, result, loop.time())

    def close(self) -> None:
        """Waits for what runs and ends both threads."""
        self._launcher.shutdown(cancel_futures=True)
        self._collector.shutdown(cancel_futures=True)

    def _run(self, plan: StepPlan) -> Pending:
        with self._breaks.step():
            self._worker.forward(plan)
            return self._worker.sample(plan)


def _note_failure(result: "asyncio.Future[StepResult]") -> None:
    """A step behind one that failed fails too, and nobody asks for it: that is no news to log."""
    if not result.cancelled():
        result.exception()

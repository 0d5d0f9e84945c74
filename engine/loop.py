"""The engine's asyncio loop: takes commands, plans steps one ahead of the device, commits results, tells the gateway.

Everything here runs on the loop's thread; only the pipeline's threads and the loader's file reads run elsewhere.
"""

import asyncio
import collections
from collections.abc import Coroutine
from typing import Any, assert_never

import msgspec

from engine.adapters.loader import AdapterLoader
from engine.adapters.loads import Wanted
from engine.collector import collect_if_due
from engine.link import EngineLink
from engine.messages import (
    Abort,
    CallResult,
    Command,
    GetStats,
    Heartbeat,
    LoadAdapter,
    OfferAdapter,
    PinAdapter,
    RequestFailed,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutputs,
    Submit,
    UnloadAdapter,
)
from engine.pipeline import Flight, Pipeline
from engine.scheduler import Scheduler
from engine.steplog import StepLog
from engine.types import AdapterInfo, EngineError, ErrorCode

HEARTBEAT_SECONDS = 1.0
HUNG_SECONDS = 60.0  # a step is hung after this, or after 20 times the largest step seen at start


class EngineLoop:
    """Runs until the gateway goes or says so. `depth` steps are on their way at most: 2 plans one step ahead."""

    def __init__(
        self, scheduler: Scheduler, loader: AdapterLoader, pipeline: Pipeline, link: EngineLink, wake: asyncio.Event,
        *, overlap: bool = True, hung_after: float = HUNG_SECONDS,
    ) -> None:  # fmt: skip
        self._scheduler = scheduler
        self._loader = loader
        self._pipeline = pipeline
        self._link = link
        self._depth = 2 if overlap else 1
        self._hung_after = hung_after
        self._flights: collections.deque[Flight] = collections.deque()
        self._wake = wake  # something changed that a new plan may use
        self._calls: set[asyncio.Task[None]] = set()
        self._time = asyncio.get_running_loop().time

    async def run(self) -> None:
        """Raises what a step or the loop itself failed with; such an engine is not to be trusted and must be left."""
        tasks = [asyncio.create_task(work) for work in (self._receive(), self._steps(), self._beat())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (*tasks, *self._calls):
                task.cancel()
            await asyncio.gather(*tasks, *self._calls, return_exceptions=True)

    # Commands

    async def _receive(self) -> None:
        while (command := await self._link.receive()) is not None and not isinstance(command, Shutdown):
            self._handle(command)
            self._wake.set()

    def _handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Abort(request_id=request_id, choice=choice):
                self._send(self._scheduler.abort(request_id, choice, self._time()))
                self._loader.settle()
            case LoadAdapter():
                self._answer(
                    command.call_id,
                    self._loader.load(_wanted(command), inplace=command.inplace, timeout=command.timeout),
                )
            case OfferAdapter(call_id=call_id, name=name, source=source):
                self._answer(call_id, self._loader.offer(name, source))
            case UnloadAdapter(call_id=call_id, name=name, timeout=timeout, force=force):
                self._answer(call_id, self._loader.unload(name, timeout, force=force))
            case PinAdapter(call_id=call_id, name=name, pinned=pinned):
                self._answer(call_id, self._loader.pin(name, pinned))
            case GetStats(call_id=call_id):
                self._link.post(CallResult(call_id=call_id, stats=self._stats()))
            case Shutdown():
                raise AssertionError("the receiving loop ends on it")
            case _:
                assert_never(command)

    def _submit(self, command: Submit) -> None:
        try:
            self._scheduler.submit(command, self._time())
        except EngineError as error:
            self._link.post(RequestFailed(request_id=command.request_id, code=error.code, message=error.message))

    def _answer(self, call_id: int, work: Coroutine[Any, Any, AdapterInfo | None]) -> None:
        """Runs a call beside the loop and posts its result, or the reason why it failed."""
        task = asyncio.create_task(self._call(call_id, work))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, call_id: int, work: Coroutine[Any, Any, AdapterInfo | None]) -> None:
        try:
            result = CallResult(call_id=call_id, adapter=await work)
        except EngineError as error:
            result = CallResult(call_id=call_id, code=error.code, message=error.message)
        except Exception as error:  # a fault of ours must not leave the caller waiting
            result = CallResult(call_id=call_id, code=ErrorCode.INTERNAL, message=f"{type(error).__name__}: {error}")
        self._link.post(result)
        self._wake.set()

    # Steps

    async def _steps(self) -> None:
        while True:
            self._wake.clear()
            self._launch()
            await self._progress()
            if self._flights and self._flights[0].result.done():
                await self._commit()

    def _launch(self) -> None:
        """Plans and launches as far ahead as allowed, and starts whatever the plans found missing."""
        while len(self._flights) < self._depth and (plan := self._scheduler.plan(self._time())) is not None:
            ahead = any(flight.plan.sequences and not flight.result.done() for flight in self._flights)
            if plan.sequences:
                self._scheduler.counters.add("steps")
                self._scheduler.counters.add("steps_planned_ahead", int(ahead))
            self._loader.dropped(self._scheduler.adapters.take_evicted())
            for load in plan.loads:
                self._loader.to_device(load)
            self._flights.append(self._pipeline.launch(plan))
        self._loader.dropped(self._scheduler.adapters.take_evicted())  # unloaded where nothing is left to plan
        for adapter_id in self._scheduler.take_fetches():
            self._loader.fetch(adapter_id)

    async def _progress(self) -> None:
        """Returns when the oldest step is done, or when there may be more to plan."""
        waits: list[asyncio.Future[Any]] = [flight.result for flight in self._flights][:1]
        if len(self._flights) == self._depth:
            await asyncio.wait(waits)
            return
        wake = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait([*waits, wake], return_when=asyncio.FIRST_COMPLETED)
        finally:
            wake.cancel()

    async def _commit(self) -> None:
        flight = self._flights.popleft()
        self._send(self._scheduler.commit(flight.result.result(), self._time()))
        self._loader.settle()
        await self._link.flush()

    def _send(self, outputs: list[SequenceOutput]) -> None:
        if outputs:
            self._link.post(StepOutputs(outputs=outputs))

    # Health

    async def _beat(self) -> None:
        lines = StepLog(self._time())
        while True:
            stats = self._stats()
            lines.observe(stats, self._time())
            self._link.post(Heartbeat(stats=stats, hung=self._hung()))
            await self._link.flush()
            if not self._flights:
                collect_if_due()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _stats(self) -> Stats:
        stats = self._scheduler.stats(self._time())
        return msgspec.structs.replace(stats, counters=stats.counters | {"graph_replays": self._pipeline.graph_replays})

    def _hung(self) -> bool:
        """Whether the device is late; a step that is done waits for the gateway to read."""
        oldest = self._flights[0] if self._flights else None
        return oldest is not None and not oldest.result.done() and self._time() - oldest.launched > self._hung_after


def _wanted(load: LoadAdapter) -> Wanted:
    return Wanted(name=load.name, source=load.source, revision=load.revision, pinned=load.pinned, weight=load.weight)

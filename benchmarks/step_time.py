"""Time in steps for a scheduler and for the engine around it: what each side of the simulator's check hooks into.

A request comes, and what a copy or a read brought is seen, when so many steps have committed. The engine's copies and
reads are real; until one is done that is due, no further step is planned.
"""

import asyncio
import contextlib
import heapq
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks.simulator import Seconds
from engine.adapters.bank import Done
from engine.adapters.host import HostAdapter
from engine.adapters.peft import AdapterFile
from engine.assemble import Engine
from engine.messages import Command, Event, RequestFailed, SequenceOutput, Stats, StepOutputs, Submit
from engine.plan import AdapterLoad, StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.types import FinishReason


@dataclass(frozen=True, slots=True)
class Told:
    """What one side says of the trace."""

    hit_rate: float  # requests whose adapter was resident when they came
    mean_wait: float  # steps planned after a request came and before its own first one
    copies: int  # from the host to the arena
    demotions: int  # from the host
    prefix_rate: float  # prompt tokens found in the prefix cache


class Steps:
    """Hooks itself into a scheduler and counts the steps that each request waits, alike on both sides.

    Steps that only start copies are none: they take no time. Each request is one sequence, numbered as it came.
    """

    def __init__(self, scheduler: Scheduler, link: "TraceLink | None" = None) -> None:
        """`link` keeps the time where there is one."""
        self._link = link
        self.planned = self.committed = 0
        self._waits: dict[int, int] = {}  # by sequence_id
        self._came: list[int] = []  # steps planned when a request came
        self._inner = (scheduler.submit, scheduler.plan, scheduler.commit)
        scheduler.submit = self._submit  # type: ignore[method-assign]
        scheduler.plan = self._plan  # type: ignore[method-assign]
        scheduler.commit = self._commit  # type: ignore[method-assign]

    def told(self, stats: Stats) -> Told:
        """`stats` are the scheduler's, at the end."""
        counters = stats.counters
        asked = counters["adapter_hits"] + counters["adapter_misses"]
        assert len(self._waits) == asked, "a request was never planned"
        return Told(
            hit_rate=counters["adapter_hits"] / asked,
            mean_wait=statistics.mean(self._waits.values()),
            copies=stats.loads["device/ok"],
            demotions=stats.evictions["host/capacity"],
            prefix_rate=counters["prefix_hit_tokens"] / counters["prefix_query_tokens"],
        )

    def _submit(self, command: Submit, now: float) -> None:
        self._inner[0](command, self._time(now))
        self._came.append(self.planned)
        if self._link is not None:
            self._link.submitted()

    def _plan(self, now: float) -> StepPlan | None:
        plan = self._inner[1](self._time(now))
        if plan is None and self._link is not None:
            self._link.nothing_to_plan()
        if plan is not None and plan.sequences:
            for admission in plan.admissions:
                wait = self.planned - self._came[admission.sequence_id - 1]
                self._waits.setdefault(admission.sequence_id, wait)  # one that was preempted comes again
            self.planned += 1
        return plan

    def _commit(self, result: StepResult, now: float) -> list[SequenceOutput]:
        outputs = self._inner[2](result, self._time(now))
        self.committed += bool(result.results)
        return outputs

    def _time(self, now: float) -> float:
        return now if self._link is None else self._link.now


@dataclass(order=True, slots=True)
class Held:
    """A copy or a read under way."""

    at: float  # when it is done, in steps
    number: int  # of those that are done at the same time the first begun comes first
    due: asyncio.Event = field(default_factory=asyncio.Event, compare=False)
    over: asyncio.Event = field(default_factory=asyncio.Event, compare=False)  # the scheduler knows


class TraceLink:
    """The engine's end of a link behind which a trace stands. It keeps the time.

    That is the steps committed, and what was skipped: an engine with nothing to run meets the next event at once.
    """

    def __init__(self) -> None:
        self._commands: asyncio.Queue[Command | None] = asyncio.Queue()
        self._due: list[tuple[float, Submit]] = []  # the next one last
        self._held: list[Held] = []  # a heap
        self._numbers = itertools.count()
        self._steps: Steps | None = None
        self._resting: Callable[[], bool] = lambda: False
        self._told = self._known = 0  # changes so far; those that the last plan knew of
        self._rested = asyncio.Event()
        self._catching_up = asyncio.Lock()
        self._open = 0
        self._skipped = 0.0

    @property
    def now(self) -> float:
        """In steps."""
        return self._skipped + (0 if self._steps is None else self._steps.committed)

    async def begin(self, arrivals: list[tuple[float, Submit]], steps: Steps, resting: Callable[[], bool]) -> None:
        """`arrivals` are in steps; `resting` says whether no plan is on its way."""
        self._due, self._steps, self._resting = arrivals[::-1], steps, resting
        await self.flush()

    def hold(self, steps: float, begin: float | None = None) -> Held:
        """What begins now, or then, and takes so many steps."""
        held = Held((self.now if begin is None else begin) + steps, next(self._numbers))
        heapq.heappush(self._held, held)
        return held

    def end(self, held: Held) -> None:
        """The scheduler has been told what came of it."""
        self._told += 1
        held.over.set()

    def submitted(self) -> None:
        """The scheduler has a request."""
        self._told += 1

    def nothing_to_plan(self) -> None:
        """The scheduler has looked."""
        self._known = self._told
        self._rested.set()

    @contextlib.contextmanager
    def skipping(self) -> Iterator[None]:
        """Time passes also where no step does."""
        task = asyncio.create_task(self._skip())
        try:
            yield
        finally:
            task.cancel()

    def post(self, message: Event) -> None:
        """Raises RuntimeError for a request that failed."""
        match message:
            case StepOutputs(outputs=outputs):
                self._open -= sum(output.finish is FinishReason.LENGTH for output in outputs)
            case RequestFailed(message=reason):
                raise RuntimeError(f"a request of the trace failed: {reason}")

    async def flush(self) -> None:
        """Called at every commit: what is due is known before the next plan, as in the simulator."""
        async with self._catching_up:
            await self._catch_up()
        await asyncio.sleep(0)

    async def receive(self) -> Command | None:
        return await self._commands.get()

    async def close(self) -> None:
        """Nobody is at the other end."""

    async def _skip(self) -> None:
        while True:
            await self._rested.wait()
            self._rested.clear()
            async with self._catching_up:
                if self._known == self._told and self._commands.empty() and self._resting():
                    events = [held.at for held in self._held[:1]] + [at for at, _ in self._due[-1:]]
                    self._skipped += max(0.0, min(events, default=0.0) - self.now)
                    await self._catch_up()

    async def _catch_up(self) -> None:
        """Whatever has happened by now; ends the engine behind the last request."""
        if self._steps is None:
            return
        while self._held and self._held[0].at <= self.now:
            held = heapq.heappop(self._held)
            held.due.set()
            await held.over.wait()
        while self._due and self._due[-1][0] <= self.now:
            self._commands.put_nowait(self._due.pop()[1])
            self._open += 1
        if not self._due and not self._open:
            self._commands.put_nowait(None)


class Loads:
    """Hooks itself into an engine: copies, one at a time, and reads take as many steps as they are said to."""

    def __init__(self, engine: Engine, link: TraceLink, seconds: Seconds) -> None:
        """`seconds` are in steps."""
        self._link = link
        self._seconds = seconds
        self._free = 0.0  # when the copy before is done
        self._reads: dict[int, Held] = {}  # by adapter_id
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        loader = engine.loader
        self._inner = (engine.worker.load, loader.fetch, loader._fetch, loader._intake.read)
        engine.worker.load = self._load  # type: ignore[method-assign,assignment]
        loader.fetch = self._fetch  # type: ignore[method-assign]
        loader._fetch = self._fetch_and_tell  # type: ignore[method-assign]
        loader._intake.read = self._read  # type: ignore[method-assign]

    def _load(self, load: AdapterLoad, adapter: HostAdapter, done: Done) -> None:
        begin = max(self._link.now, self._free)
        held = self._link.hold(self._seconds.load, begin)
        self._free = held.at

        def copied(adapter_id: int, error: BaseException | None) -> None:
            self._loop.call_soon_threadsafe(self._begin_telling, held, done, adapter_id, error)

        self._inner[0](load, adapter, copied)

    def _begin_telling(self, held: Held, done: Done, adapter_id: int, error: BaseException | None) -> None:
        task = asyncio.create_task(self._tell(held, done, adapter_id, error))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, held: Held, done: Done, adapter_id: int, error: BaseException | None) -> None:
        await held.due.wait()
        done(adapter_id, error)  # which tells the loop's thread, this one, in its turn
        self._loop.call_soon(self._link.end, held)

    def _fetch(self, adapter_id: int) -> None:
        self._reads[adapter_id] = self._link.hold(self._seconds.source)
        self._inner[1](adapter_id)

    async def _fetch_and_tell(self, adapter_id: int) -> None:
        await self._inner[2](adapter_id)
        self._link.end(self._reads.pop(adapter_id))

    async def _read(self, adapter_id: int, source: str, revision: str | None, *, again: bool = True) -> AdapterFile:
        file = await self._inner[3](adapter_id, source, revision, again=again)
        await self._reads[adapter_id].due.wait()
        return file

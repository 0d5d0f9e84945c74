"""The simulator against the real engine: the same trace, the same sizes, a tiny model on the CPU.

Time is counted in steps on both sides, so the machine's speed does not matter: a request comes, and what a copy or a
read brought is seen, when so many steps have committed. The engine's copies and reads are real; until one is done that
is due, no further step is planned.
"""

import argparse
import asyncio
import contextlib
import heapq
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.checkpoint import TINY, write_checkpoint
from benchmarks.simulator import Seconds, Simulation, Traffic
from engine.adapters.bank import Done
from engine.adapters.host import HostAdapter
from engine.adapters.peft import AdapterFile
from engine.assemble import Engine, build
from engine.config import EngineConfig, LoraPath
from engine.messages import Command, Event, RequestFailed, SequenceOutput, Stats, StepOutputs, Submit
from engine.models.dims import LORA_MODULES
from engine.plan import AdapterLoad, StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.types import FinishReason

RANKS = (8, 16, 32)  # of the adapters, in turn
BLOCK_TOKENS = 32  # of the tiny model
TRAFFIC = Traffic("Zipf 1.0, mixed ranks", 1.0, rate=0.5, prefix=64, prompt=16, output=12)  # rate: requests a step
CONTEXT = 96
ARENA_CHUNKS = 120
SECONDS = Seconds(step=1.0, token=0.0, load=0.6, chunk=0.0, source=3.4)  # in steps


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run."""

    requests: int = 3000
    adapters: int = 120
    on_host: int = 60


SMALL = Scale(requests=400, adapters=60, on_host=40)


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

    def __init__(self, engine: Engine, link: TraceLink) -> None:
        self._link = link
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
        held = self._link.hold(SECONDS.load, begin)
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
        self._reads[adapter_id] = self._link.hold(SECONDS.source)
        self._inner[1](adapter_id)

    async def _fetch_and_tell(self, adapter_id: int) -> None:
        await self._inner[2](adapter_id)
        self._link.end(self._reads.pop(adapter_id))

    async def _read(self, adapter_id: int, source: str, revision: str | None, *, again: bool = True) -> AdapterFile:
        file = await self._inner[3](adapter_id, source, revision, again=again)
        await self._reads[adapter_id].due.wait()
        return file


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of the engine, and what the simulator needs to do the same."""

    told: Told
    pages: tuple[int, ...]  # chunks of the adapters, in turn
    config: SchedulerConfig
    overlap: bool


async def run_engine(scale: Scale, seed: int, *, overlap: bool) -> Measured:
    """Serves the trace with a tiny model and adapters of random weights."""
    link = TraceLink()
    with tempfile.TemporaryDirectory() as folder:
        engine = await build(settings(write_checkpoint(Path(folder), TINY), scale, overlap=overlap), link)
    try:
        return await _follow(engine, link, scale, seed, overlap=overlap)
    finally:
        engine.close()


def settings(model: Path, scale: Scale, *, overlap: bool) -> EngineConfig:
    paths = [
        LoraPath(name=str(index), path=f"random-{RANKS[index % len(RANKS)]}-all-{index}")
        for index in range(scale.adapters)
    ]
    return EngineConfig(
        model_path=str(model), load_format="dummy", device="cpu", threads=1, enable_lora=True, context_length=CONTEXT,
        lora_paths=tuple(paths), max_loaded_loras=scale.on_host, max_host_lora_bytes=64 << 20,
        max_lora_rank=max(RANKS), lora_target_modules=LORA_MODULES, max_total_tokens=ARENA_CHUNKS * BLOCK_TOKENS,
        disable_overlap_schedule=not overlap,
    )  # fmt: skip


async def _follow(engine: Engine, link: TraceLink, scale: Scale, seed: int, *, overlap: bool) -> Measured:
    scheduler = engine.scheduler
    steps = Steps(scheduler, link)
    Loads(engine, link)
    infos = {int(info.name): info for info in scheduler.adapters.infos()}
    traffic = replace(TRAFFIC, adapters=scale.adapters)
    arrivals = [
        (at, traffic.request(number, adapter, infos[adapter].adapter_id))
        for number, (at, adapter) in enumerate(traffic.arrivals(scale.requests, seed), 1)
    ]
    await link.begin(arrivals, steps, lambda: not engine.loop._flights)
    with link.skipping():
        await engine.run()
    pages = tuple(infos[index].bytes // scheduler.config.chunk_bytes for index in range(len(RANKS)))
    return Measured(steps.told(scheduler.stats()), pages, scheduler.config, overlap)


def run_simulator(measured: Measured, scale: Scale, seed: int) -> Told:
    """The same trace by the simulator, with the sizes of the engine that ran."""
    traffic = replace(TRAFFIC, adapters=scale.adapters, pages=measured.pages)
    simulation = Simulation(
        measured.config, traffic, requests=scale.requests, seed=seed, seconds=SECONDS, ahead=measured.overlap
    )
    steps = Steps(simulation.scheduler)
    simulation.run()
    return steps.told(simulation.scheduler.stats())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the short form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-overlap", action="store_true", help="the engine plans no step ahead")
    parser.add_argument("--json", type=Path, help="keep both rows here")
    args = parser.parse_args()
    scale = SMALL if args.small else Scale()
    measured = asyncio.run(run_engine(scale, args.seed, overlap=not args.no_overlap))
    rows = {"engine": asdict(measured.told), "simulator": asdict(run_simulator(measured, scale, args.seed))}
    for side, row in rows.items():
        print(side, " ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if args.json is not None:
        args.json.write_text(json.dumps({"scale": asdict(scale), "seed": args.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

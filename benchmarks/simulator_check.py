"""The simulator against the real engine: the same trace, the same sizes, a tiny model on the CPU.

Time is counted in steps on both sides, so the machine's speed hardly matters: a request comes when so many steps have
committed. What a copy and a read take, in steps, is measured in the engine's run and told the simulator.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.checkpoint import TINY, write_checkpoint
from benchmarks.simulator import Seconds, Simulation, Traffic
from engine.assemble import Engine, build
from engine.config import EngineConfig, LoraPath
from engine.messages import Command, Event, Heartbeat, RequestFailed, SequenceOutput, Stats, StepOutputs, Submit
from engine.models.dims import LORA_MODULES
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.types import FinishReason

RANKS = (8, 16, 32)  # of the adapters, in turn
BLOCK_TOKENS = 32  # of the tiny model
TRAFFIC = Traffic("Zipf 1.0, mixed ranks", 1.0, rate=0.5, prefix=64, prompt=16, output=12)  # rate: requests a step
CONTEXT = 96
ARENA_CHUNKS = 120


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

    def __init__(self, scheduler: Scheduler) -> None:
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
        self._inner[0](command, now)
        self._came.append(self.planned)

    def _plan(self, now: float) -> StepPlan | None:
        plan = self._inner[1](now)
        if plan is not None and plan.sequences:
            for admission in plan.admissions:
                wait = self.planned - self._came[admission.sequence_id - 1]
                self._waits.setdefault(admission.sequence_id, wait)  # one that was preempted comes again
            self.planned += 1
        return plan

    def _commit(self, result: StepResult, now: float) -> list[SequenceOutput]:
        outputs = self._inner[2](result, now)
        self.committed += bool(result.results)
        return outputs


class Copies:
    """Hooks itself into a scheduler and tells how long each copy to the arena took by itself: one runs at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.seconds: list[float] = []
        self._planned: dict[int, float] = {}  # adapter_id -> when
        self._free = 0.0  # when the copy before was done
        self._inner = (scheduler.adapters.copy_planned, scheduler.adapters.load_done)
        scheduler.adapters.copy_planned = self._plan  # type: ignore[method-assign]
        scheduler.adapters.load_done = self._done  # type: ignore[method-assign]

    def _plan(self, adapter_ids: Iterable[int], now: float) -> None:
        begun = list(adapter_ids)
        self._planned.update(dict.fromkeys(begun, now))
        self._inner[0](begun, now)

    def _done(self, adapter_id: int, now: float) -> None:
        self._inner[1](adapter_id, now)
        self.seconds.append(now - max(self._planned.pop(adapter_id), self._free))
        self._free = now


class TraceLink:
    """The engine's end of a link behind which a trace stands. An engine without work gets the next request at once."""

    def __init__(self) -> None:
        self.load_seconds: list[tuple[str, float]] = []
        self._commands: asyncio.Queue[Command | None] = asyncio.Queue()
        self._due: list[tuple[float, Submit]] = []  # the next one last
        self._steps: Steps | None = None
        self._open = 0
        self._skipped = 0.0  # steps in which there was nothing to do

    def begin(self, arrivals: list[tuple[float, Submit]], steps: Steps) -> None:
        """`arrivals` are in steps."""
        self._due, self._steps = arrivals[::-1], steps
        self._release()

    def post(self, message: Event) -> None:
        """Raises RuntimeError for a request that failed."""
        match message:
            case StepOutputs(outputs=outputs):
                self._open -= sum(output.finish is FinishReason.LENGTH for output in outputs)
            case Heartbeat(stats=stats):
                self.load_seconds += stats.load_seconds
            case RequestFailed(message=reason):
                raise RuntimeError(f"a request of the trace failed: {reason}")

    async def flush(self) -> None:
        """Called at every commit: what is due is accepted before the next plan, as in the simulator."""
        self._release()
        await asyncio.sleep(0)

    async def receive(self) -> Command | None:
        return await self._commands.get()

    async def close(self) -> None:
        """Nobody is at the other end."""

    def _release(self) -> None:
        """Hands over what is due, and ends the engine behind the last."""
        if self._steps is None:
            return
        while self._due and self._is_due(self._due[-1][0], self._steps.committed):
            self._commands.put_nowait(self._due.pop()[1])
            self._open += 1
        if not self._due and not self._open:
            self._commands.put_nowait(None)

    def _is_due(self, arrival: float, committed: int) -> bool:
        if not self._open:
            self._skipped = max(self._skipped, arrival - committed)
        return arrival <= committed + self._skipped


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of the engine, and what the simulator needs to do the same."""

    told: Told
    pages: tuple[int, ...]  # chunks of the adapters, in turn
    seconds: Seconds  # in steps
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
    steps, copies = Steps(scheduler), Copies(scheduler)
    infos = {int(info.name): info for info in scheduler.adapters.infos()}
    traffic = replace(TRAFFIC, adapters=scale.adapters)
    arrivals = [
        (at, traffic.request(number, adapter, infos[adapter].adapter_id))
        for number, (at, adapter) in enumerate(traffic.arrivals(scale.requests, seed), 1)
    ]
    scheduler.stats()  # what the start took is told, and over
    begin = time.perf_counter()
    link.begin(arrivals, steps)
    await engine.run()
    step = (time.perf_counter() - begin) / steps.committed
    stats = scheduler.stats()
    took = _means([*link.load_seconds, *stats.load_seconds])
    pages = tuple(infos[index].bytes // scheduler.config.chunk_bytes for index in range(len(RANKS)))
    copy, read = statistics.mean(copies.seconds), took["source"] + took["host"]
    seconds = Seconds(step=1.0, token=0.0, load=copy / step, chunk=0.0, source=read / step)
    return Measured(steps.told(stats), pages, seconds, scheduler.config, overlap)


def _means(load_seconds: list[tuple[str, float]]) -> dict[str, float]:
    by_stage = itertools.groupby(sorted(load_seconds), key=lambda load: load[0])
    return {stage: statistics.mean(seconds for _, seconds in loads) for stage, loads in by_stage}


def run_simulator(measured: Measured, scale: Scale, seed: int) -> Told:
    """The same trace by the simulator, with the sizes of the engine that ran."""
    traffic = replace(TRAFFIC, adapters=scale.adapters, pages=measured.pages)
    simulation = Simulation(
        measured.config, traffic, requests=scale.requests, seed=seed, seconds=measured.seconds,
        ahead=measured.overlap,
    )  # fmt: skip
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
    print("in steps:", measured.seconds)
    if args.json is not None:
        args.json.write_text(json.dumps({"scale": asdict(scale), "seed": args.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

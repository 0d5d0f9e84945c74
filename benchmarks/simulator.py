"""How often adapters are resident when they are wanted, by eviction, prefetch and traffic: `make simulate`.

It drives the engine's own scheduler with a clock of its own: steps and copies take the seconds of `Seconds`, nothing is
computed. Belady knows every arrival to come; nobody can be as good as that.
"""

import argparse
import heapq
import itertools
import json
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.adapters.adapter import Adapter, Hosted
from engine.adapters.residency import HostFullError
from engine.arena import Arena
from engine.eviction import Costs, EvictionClock
from engine.messages import Submit
from engine.plan import SequenceResult, StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.types import SamplingParams

BLOCK_TOKENS = 16
COLUMNS = ("traffic", "eviction", "prefetch", "hit rate", "mean wait, ms", "99 %, ms", "loads", "prefix hits")


@dataclass(frozen=True, slots=True)
class Seconds:
    """What things take, about those of an 8B model on one GPU with a slow link."""

    step: float = 0.010
    token: float = 0.000_05
    load: float = 0.020  # of any load
    chunk: float = 0.001  # of each of its chunks
    source: float = 0.050  # of reading an adapter that is not on the host


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests for adapters by Zipf's law of popularity."""

    name: str
    skew: float
    pages: tuple[int, ...] = (8,)  # adapters' sizes in chunks, in turn
    drift: int = 0  # every so many requests the most popular adapter becomes the least; 0: never
    adapters: int = 120
    rate: float = 20.0  # requests a second
    prefix: int = 48  # tokens that an adapter's prompts begin with
    prompt: int = 16  # tokens of its own
    output: int = 32

    def arrivals(self, count: int, seed: int) -> list[tuple[float, int]]:
        """(seconds, adapter), in order of time."""
        rng = random.Random(seed)
        weights = list(itertools.accumulate((rank + 1) ** -self.skew for rank in range(self.adapters)))
        now, told = 0.0, []
        for index in range(count):
            now += rng.expovariate(self.rate)
            shift = index // self.drift if self.drift else 0
            (rank,) = rng.choices(range(self.adapters), cum_weights=weights)
            told.append((now, (rank + shift) % self.adapters))
        return told

    def request(self, number: int, adapter: int, adapter_id: int) -> Submit:
        """Prompts of one adapter begin alike; token ids are below 512."""
        prompt = [adapter % 256] * self.prefix + [256 + number % 256] * self.prompt
        params = SamplingParams(max_tokens=self.output, seed=0, ignore_eos=True)
        return Submit(request_id=number, prompt=prompt, adapter_id=adapter_id, params=params)


TRAFFICS = (
    Traffic("Zipf 0.8", 0.8),
    Traffic("Zipf 1.0", 1.0),
    Traffic("Zipf 1.2", 1.2),
    Traffic("Zipf 1.0, drifting", 1.0, drift=100),
    Traffic("Zipf 1.0, mixed ranks", 1.0, pages=(4, 8, 16, 32)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    hit_rate: float  # requests whose adapter was resident when they came
    mean_wait: float  # seconds until first in a step
    tail_wait: float  # the 99th percentile
    loads: int
    prefix_rate: float  # prompt tokens found in the prefix cache


class Belady(EvictionClock):
    """The adapter that is named again last goes first; blocks go before adapters."""

    def __init__(self, arena: Arena, next_use: Callable[[Adapter], float]) -> None:
        super().__init__(arena)
        self._next_use = next_use

    def block(self, stamp: float) -> float:
        return float("-inf")

    def adapter(self, adapter: Adapter) -> float:
        return -self._next_use(adapter)

    def first(self, idle: Iterable[Adapter]) -> Adapter | None:
        return min(idle, key=self.adapter, default=None)


def simulated(prefetch: bool, prefix_cache: bool, costs: Costs | None, num_chunks: int = 360) -> SchedulerConfig:
    """Eight slots, an arena for about 20 adapters beside the running sequences."""
    return SchedulerConfig(
        num_chunks=num_chunks, block_tokens=BLOCK_TOKENS, chunk_bytes=2 << 20, max_model_len=256, max_running=32,
        prefill_tokens=2048, enable_lora=True, max_slots=8, max_adapter_chunks=32, prefetch=prefetch,
        prefix_cache=prefix_cache, costs=costs,
    )  # fmt: skip


class Simulation:
    """One run; every request is followed from its arrival to its first step."""

    def __init__(
        self, config: SchedulerConfig, traffic: Traffic, *, requests: int, seed: int = 0, belady: bool = False,
        seconds: Seconds | None = None, ahead: bool = False,
    ) -> None:  # fmt: skip
        """`ahead`: the next step is planned while one runs, as the engine does unless told otherwise."""
        self.now = 0.0
        self._depth = 2 if ahead else 1
        self._flights: deque[StepPlan] = deque()
        self._traffic = traffic
        self._seconds = Seconds() if seconds is None else seconds
        self._arrivals = traffic.arrivals(requests, seed)
        self._due = list(reversed(self._arrivals))
        self._uses: dict[str, list[float]] = {}
        for time, adapter in self._arrivals:
            self._uses.setdefault(str(adapter), []).append(time)
        clock = (lambda arena: Belady(arena, self._next_use)) if belady else None
        self.scheduler = Scheduler(config, clock)
        self._copies: list[tuple[float, int]] = []  # (when done, adapter_id)
        self._reads: list[tuple[float, int]] = []  # likewise
        self._link_free = 0.0
        self._ids = [self._list(index) for index in range(traffic.adapters)]
        self._submitted = 0

    def run(self) -> Outcome:
        while self._due or self.scheduler.has_work:
            self._catch_up()
            if not self._step():
                self.now = max(self.now, min(self._events()))
        return self._outcome()

    def _catch_up(self) -> None:
        """Whatever has happened by now."""
        while self._copies and self._copies[0][0] <= self.now:
            _, adapter_id = heapq.heappop(self._copies)
            self.scheduler.adapters.load_done(adapter_id, self.now)
        while self._reads and self._reads[0][0] <= self.now:
            self._read(heapq.heappop(self._reads)[1])
        while self._due and self._due[-1][0] <= self.now:
            self._submit(*self._due.pop())

    def _events(self) -> Iterator[float]:
        if self._due:
            yield self._due[-1][0]
        if self._copies:
            yield self._copies[0][0]
        if self._reads:
            yield self._reads[0][0]

    def _step(self) -> bool:
        """Plans as far ahead as it may and runs the oldest plan; whether there was any."""
        while len(self._flights) < self._depth and (plan := self.scheduler.plan(self.now)) is not None:
            self._launch(plan)
        for adapter_id in self.scheduler.take_fetches():
            heapq.heappush(self._reads, (self.now + self._seconds.source, adapter_id))
        if not self._flights:
            return False
        plan = self._flights.popleft()
        if plan.sequences:
            self.now += self._seconds.step + self._seconds.token * plan.tokens
        self.scheduler.commit(_result(plan), self.now)
        return True

    def _launch(self, plan: StepPlan) -> None:
        self.scheduler.adapters.take_evicted()
        for load in plan.loads:
            begin = max(self.now, self._link_free)
            self._link_free = begin + self._seconds.load + self._seconds.chunk * len(load.chunks)
            heapq.heappush(self._copies, (self._link_free, load.adapter_id))
        self._flights.append(plan)

    def _submit(self, time: float, adapter: int) -> None:
        self._submitted += 1
        self.scheduler.submit(self._traffic.request(self._submitted, adapter, self._ids[adapter]), time)

    def _list(self, index: int) -> int:
        """At start the host takes as many as it has places for, as the engine does with --lora-paths."""
        control, name, places = self.scheduler.adapters, str(index), self.scheduler.config.max_loaded
        adapter_id = control.list_cold(name, name).adapter_id
        if places is None or index < places:
            self._read(adapter_id)
        return adapter_id

    def _read(self, adapter_id: int) -> None:
        """It was read from its source."""
        control = self.scheduler.adapters
        info = control.find(adapter_id)
        assert info is not None
        pages = self._traffic.pages[int(info.name) % len(self._traffic.pages)]
        try:
            control.make_host_room(adapter_id, pages)
        except HostFullError:
            control.host_postponed(adapter_id)
        else:
            control.host_done(adapter_id, Hosted(pages, 16, ("q_proj",), info.name))

    def _next_use(self, adapter: Adapter) -> float:
        if adapter.tally.waiting:
            return self.now
        uses = self._uses.get(adapter.name, [])
        index = bisect_right(uses, self.now)
        return uses[index] if index < len(uses) else float("inf")

    def _outcome(self) -> Outcome:
        stats = self.scheduler.stats(self.now)
        counters = stats.counters
        waits = sorted(stats.queue_seconds)
        hits, misses = counters.get("adapter_hits", 0), counters.get("adapter_misses", 0)
        return Outcome(
            hit_rate=hits / (hits + misses),
            mean_wait=sum(waits) / len(waits),
            tail_wait=waits[int(0.99 * (len(waits) - 1))],
            loads=stats.loads.get("device/ok", 0),
            prefix_rate=counters["prefix_hit_tokens"] / counters["prefix_query_tokens"],
        )


def _result(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, [SequenceResult([5] if row.sample else []) for row in plan.sequences], 0.0)


def true_costs(seconds: Seconds) -> Costs:
    """What bringing back takes in the simulation."""
    return Costs(block=BLOCK_TOKENS * seconds.token, chunk=seconds.chunk, load=seconds.load)


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    traffic: Traffic
    eviction: str  # lru | clock | belady
    prefetch: bool

    def run(self, requests: int, *, prefix_cache: bool = True, seed: int = 0) -> Outcome:
        costs = true_costs(Seconds()) if self.eviction == "clock" else None
        config = simulated(self.prefetch, prefix_cache, costs)
        return Simulation(config, self.traffic, requests=requests, seed=seed, belady=self.eviction == "belady").run()


def cases() -> list[Case]:
    return [
        Case(traffic, eviction, prefetch)
        for traffic in TRAFFICS
        for eviction in ("lru", "clock", "belady")
        for prefetch in (False, True)
    ]


@dataclass(slots=True)
class Table:
    """Printed row by row as Markdown, kept as JSON."""

    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, case: Case, outcome: Outcome) -> None:
        if not self.rows:
            print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
        self.rows.append(
            {"traffic": case.traffic.name, "eviction": case.eviction, "prefetch": case.prefetch} | asdict(outcome)
        )
        told = (
            case.traffic.name, case.eviction, "on" if case.prefetch else "off", f"{outcome.hit_rate:.3f}",
            f"{1000 * outcome.mean_wait:.1f}", f"{1000 * outcome.tail_wait:.0f}", str(outcome.loads),
            f"{outcome.prefix_rate:.3f}",
        )  # fmt: skip
        print("| " + " | ".join(told) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000, help="requests of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--json", type=Path, help="keep the table here")
    args = parser.parse_args()
    table = Table()
    for case in cases():
        table.add(case, case.run(args.requests, prefix_cache=not args.no_prefix_cache, seed=args.seed))
    if args.json is not None:
        args.json.write_text(json.dumps({"requests": args.requests, "seed": args.seed, "rows": table.rows}, indent=1))


if __name__ == "__main__":
    main()

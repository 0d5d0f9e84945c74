"""S-LoRA's trace: many adapters of rank 8 on q, k, v and o under more load than can be served; complete requests count.

Lengths uniform in 8..512, gaps of gamma distribution with cv 1, adapters by Zipf 1.0. And the same kind of load with
an arena that holds all adapters, or only some of them (`capped`).
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.clients import EngineTarget
from benchmarks.driving import Outcome, at_times, in_turn
from benchmarks.engines import load_adapters, moved, steps_taken
from benchmarks.load import Job
from benchmarks.report import Report
from benchmarks.traffic import Lengths, arrival_times, make_jobs, until, zipf
from engine.client import EngineClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """`seconds` are measured behind `warm` seconds, in which the batch fills; of the capacity, `capacity` seconds."""

    counts: tuple[int, ...] = (5, 2000, 100, 1000)  # the fewest, then the most: a run that is cut off has their ratio
    rank: int = 8
    modules: str = "qkvo"
    lengths: tuple[int, int] = (8, 512)
    overload: float = 1.4  # arrivals over what streams in turn are served
    streams: int = 256
    warm: float = 6.0
    seconds: float = 32.0  # in half of it a ratio differs from run to run by more than is at stake
    capacity: float = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capped:
    adapters: int = 1000
    fitting: int = 64  # adapters that the capped arena holds beside the KV of all that run
    rank: int = 16
    modules: str = "qkvo"
    lengths: tuple[int, int] = (8, 512)
    streams: int = 256
    warm: float = 8.0
    seconds: float = 20.0


SMALL = Trace(counts=(2, 4), lengths=(4, 12), streams=2, warm=0.3, seconds=0.7, capacity=0.7)
SMALL_CAPPED = Capped(adapters=6, fitting=2, rank=8, lengths=(4, 12), streams=2, warm=0.3, seconds=0.7)


async def trace(client: EngineClient, scale: Trace, report: Report) -> None:
    """Complete requests a second for each number of adapters, and over those for the fewest."""
    capacity = await _capacity(client, scale, report)
    rates: dict[int, float] = {}
    for count in scale.counts:
        names = await load_adapters(client, "s", count, scale.rank, scale.modules)
        rate = scale.overload * capacity
        jobs = _jobs(client, names, scale.lengths)
        arrivals = until(scale.warm + scale.seconds, arrival_times(rate, 1.0, seed=3), jobs)
        before = await client.stats()
        outcome = await at_times(EngineTarget(client), arrivals, scale.warm + scale.seconds)
        after = await client.stats()
        loads, evictions = moved(before, after)
        offered = len(arrivals) / outcome.seconds
        served = rates[count] = outcome.rate(scale.warm)
        note = f"{loads} loads, {evictions} evictions, {offered / served:.2f} x offered, {steps_taken(after)}"
        report.add(f"S-LoRA's trace, n = {count}: complete requests", "1/s", [served], note=note)
        report.add(f"S-LoRA's trace, n = {count}: tokens of them", "tokens/s", [outcome.tokens_per_second(scale.warm)])
        report.add(f"S-LoRA's trace, n = {count}: offered over served", "x", [offered / served])
        if count != scale.counts[0]:
            ratio = served / rates[scale.counts[0]]
            report.add(f"S-LoRA's trace, n = {count} over n = {scale.counts[0]}", "x", [ratio])


async def _capacity(client: EngineClient, scale: Trace, report: Report) -> float:
    """Requests a second of streams in turn over the fewest adapters."""
    names = await load_adapters(client, "s", scale.counts[0], scale.rank, scale.modules)
    outcome = await _in_turn(client, names, scale, scale.capacity)
    rate = outcome.rate(scale.warm)
    report.add(f"{scale.streams} streams in turn, {scale.counts[0]} adapters", "1/s", [rate])
    return rate


@dataclass(slots=True)
class Watched:
    """The most of the arena that keys and values took, looked at twice a second."""

    kv: int = 0  # chunks

    async def watch(self, client: EngineClient) -> None:
        while True:
            self.kv = max(self.kv, (await client.stats()).chunks["kv"])
            await asyncio.sleep(0.5)


async def arena(client: EngineClient, scale: Capped, report: Report, what: str) -> tuple[float, int]:
    """(tokens a second, most chunks of KV) of streams in turn over many adapters; the arena is the caller's."""
    names = await load_adapters(client, "c", scale.adapters, scale.rank, scale.modules)
    before, watched = await client.stats(), Watched()
    async with watching(watched.watch(client)):
        outcome = await _in_turn(client, names, scale, scale.seconds)
    loads, evictions = moved(before, await client.stats())
    chunks = client.model.num_chunks
    rate = outcome.tokens_per_second(scale.warm)
    name = f"{scale.adapters} adapters r{scale.rank} {scale.modules}, Zipf 1.0, {what} arena"
    note = f"{chunks} chunks, up to {watched.kv} of KV, {loads} loads, {evictions} evictions"
    report.add(name, "tokens/s", [rate], note=note)
    report.add(f"{name}: loads", "times", [loads])
    report.add(f"{name}: evictions", "times", [evictions])
    return rate, watched.kv


@contextlib.asynccontextmanager
async def watching(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs beside, and ends with, what stands inside."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _in_turn(
    client: EngineClient, names: Sequence[str], scale: Trace | Capped, seconds: float
) -> Outcome:  # fmt: skip
    jobs = _jobs(client, names, scale.lengths)
    return await in_turn(EngineTarget(client), jobs, scale.streams, scale.warm + seconds)


def _jobs(client: EngineClient, names: Sequence[str], bounds: tuple[int, int]) -> Iterator[Job]:
    lengths = Lengths(bounds, bounds, client.model.vocab_size)
    return itertools.chain(make_jobs(zipf(names, 1.0, seed=1), lengths, seed=2))

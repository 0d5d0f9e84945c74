"""Cold starts: the first token of an adapter on the host, or on disk alone, and what other streams feel of it."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.clients import Answer, EngineTarget
from benchmarks.driving import Outcome, in_turn, percentile
from benchmarks.engines import load_adapters, moved
from benchmarks.load import Job
from benchmarks.report import Report
from benchmarks.traffic import BASE, Lengths, make_jobs
from engine.client import EngineClient

PROBE = (16, 2)  # tokens in and out of the request that meets a cold adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """Streams run all the while; every `interval` seconds a short request comes for another adapter."""

    streams: int = 32
    prompt: int = 64  # of a stream's request
    output: int = 256
    warm: int = 8  # adapters that are in the arena
    loads: int = 100
    rank: int = 16
    interval: float = 0.06
    disk_interval: float = 0.2
    lead: float = 1.0  # seconds before the first and behind the last


SMALL = Cold(
    streams=2, prompt=8, output=16, warm=2, loads=3, rank=8, interval=0.05, disk_interval=0.1, lead=0.2
)  # fmt: skip


async def cold(client: EngineClient, scale: Cold, files: Sequence[Path], report: Report) -> None:
    """`files`: adapters on disk, loaded in turn under fresh names."""
    bench = Bench(client, scale, report)
    warm = await load_adapters(client, "warm", scale.warm, scale.rank, "all")
    await asyncio.gather(*(bench.ask(name) for name in warm))
    none = await bench.phase("none", ())
    resident = await bench.phase("in the arena", [partial(bench.ask, name) for name in cycled(warm, scale.loads)])
    names = await load_adapters(client, "host", scale.loads, scale.rank, "all")
    before = await client.stats()
    host = await bench.phase("on the host", [partial(bench.ask, name) for name in names])
    loads, _ = moved(before, await client.stats())
    report.add("cold start: adapters copied from the host meanwhile", "times", [loads])
    report.add("cold start: 99th percentile of the streams' gaps, host loads less none", "ms", [host - resident])
    if files:
        disk = await bench.phase(
            "on disk", [partial(bench.from_disk, i, files[i % len(files)]) for i in range(scale.loads)],
            scale.disk_interval,
        )  # fmt: skip
        report.add("cold start: 99th percentile of the streams' gaps, disk loads less none", "ms", [disk - resident])
    report.add("cold start: the same, short requests of resident adapters less no request", "ms", [resident - none])


def cycled(names: Sequence[str], count: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(names), count))


class Bench:
    """Streams of the base, with something beside them."""

    def __init__(self, client: EngineClient, scale: Cold, report: Report) -> None:
        self._client = client
        self._target = EngineTarget(client)
        self._scale = scale
        self._report = report
        lengths = Lengths((scale.prompt,) * 2, (scale.output,) * 2, client.model.vocab_size)
        self._jobs = make_jobs(itertools.repeat(BASE), lengths, seed=1)

    async def ask(self, name: str) -> float:
        """Milliseconds to the first token of a short request."""
        answer = Answer(Job(name, tuple(range(PROBE[0])), PROBE[1]), time.perf_counter())
        await self._target.answer(answer.job, answer)
        return (answer.first - answer.sent) * 1e3

    async def from_disk(self, number: int, file: Path) -> float:
        """Milliseconds from the call that loads an adapter to its first token."""
        began = time.perf_counter()
        name = f"disk{number}"
        await self._client.load_adapter(name, str(file))
        loaded = (time.perf_counter() - began) * 1e3
        first = await self.ask(name)
        await self._client.unload_adapter(name)
        return loaded + first

    async def phase(
        self, what: str, probes: Sequence[Callable[[], Awaitable[float]]], interval: float | None = None
    ) -> float:
        """The 99th percentile of the streams' gaps while the probes come; adds the gaps and the probes' times."""
        scale = self._scale
        step = scale.interval if interval is None else interval
        count = len(probes) or scale.loads
        seconds = count * step + 2 * scale.lead
        streams = asyncio.create_task(in_turn(self._target, self._jobs, scale.streams, seconds))
        times = await self._probe(probes, step)
        return self._told(what, await streams, times, scale.lead, scale.lead + count * step)

    async def _probe(self, probes: Iterable[Callable[[], Awaitable[float]]], step: float) -> list[float]:
        """One after the other is begun, whether or not those before have ended."""
        start = time.perf_counter() + self._scale.lead
        tasks = []
        for number, probe in enumerate(probes):
            await asyncio.sleep(max(0.0, start + number * step - time.perf_counter()))
            tasks.append(asyncio.ensure_future(probe()))
        return list(await asyncio.gather(*tasks))

    def _told(self, what: str, streams: Outcome, times: Sequence[float], after: float, before: float) -> float:
        if times:
            note = f"99 %: {percentile(times, 0.99):.1f}"
            self._report.add(f"cold start: first token, adapter {what}", "ms", times, note=note)
        gaps = streams.gaps(after, before)
        tail = percentile(gaps, 0.99)
        name = f"cold start: gaps of {self._scale.streams} other streams, adapters asked for: {what}"
        self._report.add(f"{name}, median", "ms", [percentile(gaps, 0.5)])
        self._report.add(f"{name}, 99th percentile", "ms", [tail])
        return tail

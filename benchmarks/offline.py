"""Throughput of the whole engine without HTTP: many requests at once over the base, a few adapters, many adapters."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.clients import EngineTarget
from benchmarks.driving import at_once
from benchmarks.engines import load_adapters, moved
from benchmarks.report import Report
from benchmarks.traffic import BASE, Lengths, make_jobs, zipf
from engine.client import EngineClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    requests: int = 512
    prompt: int = 512
    output: int = 128
    few: int = 8
    many: int = 64  # adapters, Zipf 1.0
    rank: int = 16
    runs: int = 3


SMALL = Offline(requests=6, prompt=12, output=4, few=2, many=4, rank=8, runs=1)


async def offline(client: EngineClient, scale: Offline, report: Report) -> None:
    """Tokens a second, prompts and outputs; the first of all requests goes before the clock, to warm up."""
    names = await load_adapters(client, "a", scale.many, scale.rank, "all")
    target = EngineTarget(client)
    slots, rank = client.model.max_loras_per_batch, scale.rank
    cases: dict[str, Iterator[str]] = {
        "base": itertools.repeat(BASE),
        f"{scale.few} adapters r{rank}": itertools.cycle(names[: scale.few]),
        f"{scale.many} adapters r{rank} Zipf 1.0, {slots} slots": zipf(names, 1.0, seed=1),
    }
    lengths = Lengths((scale.prompt, scale.prompt), (scale.output, scale.output), client.model.vocab_size)
    for name, models in cases.items():
        jobs = list(itertools.islice(make_jobs(models, lengths, seed=2), scale.requests))
        await at_once(target, jobs[: client.model.max_loras_per_batch])
        before = await client.stats()
        rates = [(await at_once(target, jobs)).tokens_per_second() for _ in range(scale.runs)]
        loads, evictions = moved(before, await client.stats())
        what = f"{scale.requests} requests ({scale.prompt} in, {scale.output} out) at once, {name}"
        report.add(what, "tokens/s", rates, note=f"{loads} loads, {evictions} evictions")

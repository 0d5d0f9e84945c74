"""A load for any OpenAI-compatible server: requests as data, an async client that sends them, what came back."""

import asyncio
import itertools
import random
import time
from dataclasses import dataclass

import httpx
import orjson


@dataclass(frozen=True, slots=True)
class Job:
    """One completion: random prompt tokens, a fixed number of output tokens (end tokens are ignored)."""

    model: str
    prompt: tuple[int, ...]
    output: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds since the load's start; `gaps` are the times between a stream's chunks."""

    tokens: int
    first: float
    end: float
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadResult:
    outcomes: list[Outcome]
    seconds: float

    @property
    def output_tokens_per_second(self) -> float:
        return sum(outcome.tokens for outcome in self.outcomes) / self.seconds


def random_jobs(
    models: list[str], count: int, lengths: tuple[int, int], outputs: tuple[int, int], vocab: int, seed: int
) -> list[Job]:
    """`count` jobs that take the models in turn, prompt and output lengths uniform in their bounds (inclusive)."""
    draw = random.Random(seed)
    return [
        Job(
            models[i % len(models)],
            tuple(draw.randrange(100, vocab - 100) for _ in range(draw.randint(*lengths))),
            draw.randint(*outputs),
        )
        for i in range(count)
    ]


async def run_load(base_url: str, jobs: list[Job], *, stream: bool = False) -> LoadResult:
    """Sends all jobs at once and waits for all. Raises on any answer that is no success or is short of tokens."""
    limits = httpx.Limits(max_connections=len(jobs), max_keepalive_connections=len(jobs))
    async with httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        send = _stream if stream else _complete
        outcomes = await asyncio.gather(*(send(client, job, start) for job in jobs))
        return LoadResult(list(outcomes), time.perf_counter() - start)


def _body(job: Job, stream: bool) -> dict[str, object]:
    extra = {"stream_options": {"include_usage": True}} if stream else {}
    return {
        "model": job.model, "prompt": list(job.prompt), "max_tokens": job.output, "temperature": 0,
        "ignore_eos": True, "stream": stream, **extra,
    }  # fmt: skip


async def _complete(client: httpx.AsyncClient, job: Job, start: float) -> Outcome:
    response = await client.post("/v1/completions", json=_body(job, stream=False))
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text[:300]}")
    end = time.perf_counter() - start
    return Outcome(_checked(response.json()["usage"], job), end, end)


async def _stream(client: httpx.AsyncClient, job: Job, start: float) -> Outcome:
    times: list[float] = []
    usage: dict[str, int] | None = None
    async with client.stream("POST", "/v1/completions", json=_body(job, stream=True)) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = orjson.loads(line[6:])
            usage = event.get("usage") or usage
            if event["choices"]:
                times.append(time.perf_counter() - start)
    if usage is None:
        raise RuntimeError("the stream ended without its usage")
    gaps = tuple(b - a for a, b in itertools.pairwise(times))
    return Outcome(_checked(usage, job), times[0], times[-1], gaps)


def _checked(usage: dict[str, int], job: Job) -> int:
    if usage["completion_tokens"] != job.output:
        raise RuntimeError(f"asked for {job.output} tokens, got {usage['completion_tokens']}")
    return usage["completion_tokens"]

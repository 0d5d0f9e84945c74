"""Who answers a load: an engine spoken to as the gateway does, or any OpenAI-compatible server over HTTP.

The HTTP client is made for measuring: it reads a stream's events and notes their times, and does nothing else, so that
one core keeps up with a fast server.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import orjson

from benchmarks.load import Job
from benchmarks.traffic import BASE
from engine.client import EngineClient
from engine.types import SamplingParams

_LIMIT = 2**20  # bytes buffered of an answer
_DATA = b"data: {"


@dataclass(slots=True)
class Answer:
    """One job's answer, by time.perf_counter(). `times` are those of its events, of one or more tokens each."""

    job: Job
    sent: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def complete(self) -> bool:
        return self.tokens == self.job.output

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def end(self) -> float:
        return self.times[-1]


class Client(Protocol):
    """Sends a job and fills its answer as it comes. Raises where the server refuses; cancelled, it leaves."""

    async def answer(self, job: Job, answer: Answer) -> None: ...


class EngineTarget:
    """An engine in its own process (or in this one, in tests), greedy, to the full length."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def answer(self, job: Job, answer: Answer) -> None:
        params = SamplingParams(max_tokens=job.output, seed=0, temperature=0.0, ignore_eos=True)
        adapter = None if job.model == BASE else self._client.adapters[job.model].adapter_id
        async with self._client.generate(prompt=list(job.prompt), params=params, adapter_id=adapter) as generation:
            async for outputs in generation:
                if count := sum(len(output.tokens) for output in outputs):
                    answer.times.append(time.perf_counter())
                    answer.tokens += count


class HttpTarget:
    """A server's /v1/completions as a stream. `model` names a job's model as that server does."""

    def __init__(self, base_url: str, model: Callable[[str], str], api_key: str = "") -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = f"{parts.path.rstrip('/').removesuffix('/v1')}/v1/completions"
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._model = model
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def answer(self, job: Job, answer: Answer) -> None:
        """Raises RuntimeError for an answer that is no success or ends early."""
        connection = self._idle.pop() if self._idle else await self._connect()
        reader, writer = connection
        try:
            writer.write(self._request(job))
            await _read_stream(reader, answer)
        except BaseException:
            writer.close()
            raise
        self._idle.append(connection)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, limit=_LIMIT)

    def _request(self, job: Job) -> bytes:
        body = orjson.dumps(
            {
                "model": self._model(job.model), "prompt": job.prompt, "max_tokens": job.output, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            }
        )  # fmt: skip
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def _read_stream(reader: asyncio.StreamReader, answer: Answer) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head.lower():
        raise RuntimeError(f"{status}: {(await _plain(reader, head))[:300]!r}")
    usage: dict[str, int] | None = None
    async for part in _chunks(reader):
        for line in part.split(b"\n"):
            if not line.startswith(_DATA):
                continue
            if b'"usage":{' in line or b'"usage": {' in line:
                usage = orjson.loads(line[6:])["usage"]
            if b'"choices":[]' not in line and b'"choices": []' not in line:
                answer.times.append(time.perf_counter())
            if b'"error"' in line[:12]:
                raise RuntimeError(line.decode())
    if status != 200 or usage is None:
        raise RuntimeError(f"{status}: the stream ended without its usage")
    answer.tokens = usage["completion_tokens"]


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body's chunks; servers send whole events in each."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


async def _plain(reader: asyncio.StreamReader, head: bytes) -> bytes:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.split(b":")[1]))
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(reader.read(_LIMIT), 1)
    return b""

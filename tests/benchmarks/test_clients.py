"""The measuring HTTP client against scripted servers, and what a run makes of answers."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks import online
from benchmarks.clients import Answer, HttpTarget
from benchmarks.driving import Outcome, at_once, at_times, in_turn, percentile
from benchmarks.load import Job
from benchmarks.traffic import Arrival

JOB = Job("a", (1, 2, 3), 2)
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":"x"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def scripted(*parts: bytes, forever: bool = False) -> AsyncIterator[tuple[HttpTarget, list[dict[str, Any]]]]:
    """A server that sends these for each request, and the bodies that it got. `forever`: it never ends an answer."""
    bodies: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                bodies.append(json.loads(await reader.readexactly(size)))
                writer.write(b"".join(parts))
                await (reader.read() if forever else writer.drain())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    target = HttpTarget(f"http://127.0.0.1:{port}/v1", lambda model: f"base:{model}")
    try:
        yield target, bodies
    finally:
        target.close()
        server.close()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


STREAM = (HEAD, *map(chunk, (TOKEN, TOKEN, USAGE, DONE)), b"0\r\n\r\n")


async def test_a_stream_is_timed_event_by_event_and_its_connection_used_again() -> None:
    async with scripted(*STREAM) as (target, bodies):
        for _ in range(2):
            answer = Answer(JOB, time.perf_counter())
            await target.answer(JOB, answer)
            assert answer.complete
            assert len(answer.times) == 2
            assert answer.sent < answer.first <= answer.end
    assert [body["model"] for body in bodies] == ["base:a", "base:a"]
    assert bodies[0]["prompt"] == [1, 2, 3]
    assert bodies[0]["ignore_eos"]


async def test_a_refusal_is_raised_with_its_reason() -> None:
    body = b'{"error":{"message":"no such model"}}'
    head = f"HTTP/1.1 404 Not Found\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with scripted(head, body) as (target, _):
        with pytest.raises(RuntimeError, match=r"404.*no such model"):
            await at_once(target, [JOB])


async def test_a_stream_without_its_usage_is_no_answer() -> None:
    async with scripted(HEAD, chunk(TOKEN), b"0\r\n\r\n") as (target, _):
        with pytest.raises(RuntimeError, match="without its usage"):
            await at_once(target, [JOB])


async def test_what_is_cut_off_is_not_complete() -> None:
    async with scripted(HEAD, chunk(TOKEN), forever=True) as (target, bodies):
        outcome = await at_times(target, [Arrival(0.0, JOB), Arrival(0.05, JOB)], 0.2)
    assert len(outcome.answers) == len(bodies) == 2
    assert outcome.complete() == []
    assert outcome.rate() == 0
    assert all(len(answer.times) == 1 for answer in outcome.answers)


async def test_streams_in_turn_send_the_next_when_one_has_ended() -> None:
    async with scripted(*STREAM) as (target, bodies):
        outcome = await in_turn(target, itertools.repeat(JOB), 2, 0.2)
    assert len(outcome.complete()) > 2
    assert len(bodies) >= len(outcome.complete())


def test_figures_of_a_run() -> None:
    """Two answers between 10 and 14 s: gaps, streams and rates by hand."""
    one = Answer(JOB, 10.0, [11.0, 12.0], 2)
    other = Answer(JOB, 10.5, [11.5, 13.5], 2)
    run = Outcome([one, other, Answer(JOB, 13.0, [13.9], 1)], 10.0, 4.0)
    assert run.complete() == [one, other]
    assert run.complete(after=3.0) == [other]
    assert run.rate() == 0.5
    assert run.tokens_per_second() == 10 / 4
    assert run.tokens_per_second(prompts=False) == 1.0
    assert run.first_tokens() == [1000.0, 1000.0]
    assert run.gaps() == [1000.0, 2000.0]
    assert run.gaps(after=1.2) == [2000.0]
    assert run.streams() == 1
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


def test_another_server_needs_its_models_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        online.main(["--base-url", "http://127.0.0.1:1"])
    assert "--base-url wants --models" in capsys.readouterr().err

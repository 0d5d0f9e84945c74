"""The event stream on bare ASGI: what is sent when, and that it always closes what it reads from."""

import asyncio
import inspect
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from sse_starlette import EventSourceResponse
from starlette.types import Message

from engine.types import EngineError, ErrorCode
from gateway.stream import EventStream, event

SCOPE: dict[str, Any] = {"type": "http", "method": "POST"}
FIRST = b"data: 1\n\n"
DONE = b"data: [DONE]\n\n"


class Source:
    """Events that come when the test says so; an exception among them is raised."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


class Client:
    """Collects what is sent; `gone` says that it left."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.put_nowait(message)

    async def body(self) -> bytes:
        async with asyncio.timeout(5):
            message = await self.messages.get()
        assert message["type"] == "http.response.body"
        return bytes(message["body"])

    async def start(self) -> Message:
        async with asyncio.timeout(5):
            message = await self.messages.get()
        assert message["type"] == "http.response.start"
        return message


def answer(source: Source, client: Client, ping: float = 15.0) -> "asyncio.Task[None]":
    return asyncio.create_task(EventStream(source.events(), ping=ping)(SCOPE, client.receive, client.send))


async def test_a_stream() -> None:
    source, client = Source(), Client()
    task = answer(source, client)
    source.queue.put_nowait(FIRST)
    start = await client.start()
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-accel-buffering"] == b"no"
    assert await client.body() == FIRST
    source.queue.put_nowait(None)
    assert await client.body() == DONE
    assert await client.body() == b""
    await task
    assert source.closed


class Text(msgspec.Struct):
    text: str


def test_an_event_is_one_line_to_every_client() -> None:
    told = Text("a\x0b\x1e\x85b\u2028c\u2029\r\nd\u00e9\u4e2d")
    lines = event(told).decode().splitlines()  # as httpx cuts them
    assert lines[1:] == [""]
    assert msgspec.json.decode(lines[0].removeprefix("data: "), type=Text) == told
    assert "\u00e9\u4e2d" in lines[0]  # nothing else is escaped


async def test_an_error_before_the_first_event_has_its_own_status() -> None:
    source, client = Source(), Client()
    source.queue.put_nowait(EngineError(ErrorCode.QUEUE_FULL, "full"))
    await answer(source, client)
    assert (await client.start())["status"] == 503
    assert b"full" in await client.body()
    assert source.closed


async def test_comments_keep_a_silent_connection_open() -> None:
    source, client = Source(), Client()
    task = answer(source, client, ping=0.02)
    assert (await client.start())["status"] == 200
    assert await client.body() == b": ping\n\n"
    source.queue.put_nowait(EngineError(ErrorCode.QUEUE_FULL, "full"))
    while (data := await client.body()).startswith(b": ping"):
        pass
    assert b'"message":"full"' in data
    assert await client.body() == DONE
    await task
    assert source.closed


@pytest.mark.parametrize("events", [0, 1])
@pytest.mark.parametrize("ping", [15.0, 0.02])
async def test_a_client_that_leaves_closes_the_source(events: int, ping: float) -> None:
    source, client = Source(), Client()
    task = answer(source, client, ping)
    if events:
        source.queue.put_nowait(FIRST)
    if events or ping < 1:
        await client.start()
    client.gone.set()
    await asyncio.wait_for(task, 5)
    assert source.closed
    assert len(asyncio.all_tasks()) <= 2  # this test, and the library's one watcher a loop


async def test_an_answer_that_is_cancelled_closes_the_source() -> None:
    source, client = Source(), Client()
    task = answer(source, client)
    source.queue.put_nowait(FIRST)
    await client.start()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert source.closed


def test_events_are_sent_without_a_cancel_scope() -> None:
    """The library sends each by what the stream overrides."""
    assert "_send_with_timeout" in vars(EventSourceResponse)
    assert "self._send_with_timeout(" in inspect.getsource(EventSourceResponse._stream_response)

"""Streams and disconnects over real sockets, the steps held back so that the tests decide when tokens come."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.types import EngineError, ErrorCode
from gateway.state import Gateway
from tests.gateway.fake_engine import FakeEngine, fixed
from tests.gateway.harness import FakeMetrics, make_app, make_gateway, serve
from tests.gateway.tokenizer_files import byte_level, write_folder

COMPLETION = {"model": "llama", "prompt": "hello", "max_tokens": 100}
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "hello"}]}
ROUTES = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Gateway:
    return make_gateway(engine, write_folder(tmp_path))


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(make_app(gateway)) as address, httpx.AsyncClient(base_url=address) as client:
        yield client


async def next_event(lines: AsyncIterator[str]) -> Any:
    """The next event's data; None at [DONE]."""
    line = await anext(line async for line in lines if line)
    data = line.removeprefix("data: ")
    return None if data == "[DONE]" else json.loads(data)


@pytest.mark.parametrize(("route", "body"), ROUTES)
async def test_a_token_is_sent_before_the_next_one_is_made(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any]
) -> None:
    engine.script = fixed(*byte_level().encode("hello world").ids)
    engine.hold()
    opened = asyncio.create_task(
        client.send(client.build_request("POST", route, json=body | {"stream": True}), stream=True)
    )
    await engine.until(lambda: engine.running == 1)
    engine.allow(1)
    response = await opened
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.aiter_lines()
    assert "hello" in json.dumps(await next_event(lines))
    engine.allow(1)
    assert " world" in json.dumps(await next_event(lines))
    engine.allow(1)
    last = await next_event(lines)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in last
    assert await next_event(lines) is None
    await response.aclose()
    assert engine.running == 0


@pytest.mark.parametrize(("route", "body"), ROUTES)
async def test_usage_comes_last_and_is_null_before(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> None:
    options = {"stream": True, "max_tokens": 3, "n": 2, "stream_options": {"include_usage": True}}
    events = await all_events(client, route, body | options)
    *earlier, last = events
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in earlier)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["id"] == earlier[0]["id"]


async def test_usage_in_every_chunk_where_asked(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.hold()
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = COMPLETION | {"stream": True, "max_tokens": 3, "stream_options": options}
    task = asyncio.create_task(all_events(client, "/v1/completions", body))
    await engine.until(lambda: engine.running == 1)
    engine.allow(None)
    assert [event["usage"]["completion_tokens"] for event in await task] == [1, 2, 3, 3]


async def test_a_chats_first_chunk_names_the_role(client: httpx.AsyncClient) -> None:
    events = await all_events(client, "/v1/chat/completions", CHAT | {"stream": True, "n": 2, "max_tokens": 4})
    roles = [(event["choices"][0]["index"], event["choices"][0]["delta"].get("role")) for event in events]
    assert [index for index, role in roles if role == "assistant"] == [0, 1]
    assert all(event["object"] == "chat.completion.chunk" for event in events)


async def test_streamed_echo_and_log_probabilities(client: httpx.AsyncClient) -> None:
    body = COMPLETION | {"stream": True, "echo": True, "logprobs": 1, "n": 2, "max_tokens": 2, "prompt": "hello world"}
    events = await all_events(client, "/v1/completions", body)
    for index in (0, 1):
        chunks = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(chunk["text"] for chunk in chunks) == "hello worldhello world"
        merged = {key: [item for chunk in chunks for item in chunk["logprobs"][key]] for key in chunks[0]["logprobs"]}
        assert merged["token_logprobs"] == [None, -0.25, -0.25, -0.25]
        assert merged["text_offset"] == [0, 5, 11, 16]


async def test_a_failure_after_the_first_byte_is_an_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.hold()
    request = client.build_request("POST", "/v1/completions", json=COMPLETION | {"stream": True})
    opened = asyncio.create_task(client.send(request, stream=True))
    await engine.until(lambda: engine.running == 1)
    engine.allow(1)
    lines = (await opened).aiter_lines()
    await next_event(lines)
    engine.failure = EngineError(ErrorCode.ENGINE_DEAD, "the engine died")
    engine.allow(1)
    told = await next_event(lines)
    assert told == {
        "error": {
            "message": "the engine died",
            "type": "service_unavailable_error",
            "param": None,
            "code": "engine_dead",
        }
    }
    assert await next_event(lines) is None


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "the", "hello the"]])
async def test_a_client_that_goes_away_aborts_its_work(
    client: httpx.AsyncClient, engine: FakeEngine, gateway: Gateway, steps: int, stream: bool, prompt: Any
) -> None:
    """Also while no token comes: nothing but the closed socket tells."""
    engine.hold()
    body = COMPLETION | {"prompt": prompt, "stream": stream, "n": 2}
    call = asyncio.create_task(client.post("/v1/completions", json=body))
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    await engine.until(lambda: engine.running == prompts)
    engine.allow(steps * prompts)
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await engine.until(lambda: engine.running == 0, seconds=1.5)
    assert [submission.aborted for submission in engine.submissions] == [{0, 1}] * prompts
    assert isinstance(gateway.metrics, FakeMetrics)
    assert [timer.events[-1][0] for timer in gateway.metrics.timers] == ["abort"] * 2 * prompts  # type: ignore[index]


async def test_a_stream_abandoned_after_some_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.hold()
    request = client.build_request("POST", "/v1/chat/completions", json=CHAT | {"stream": True})
    opened = asyncio.create_task(client.send(request, stream=True))
    await engine.until(lambda: engine.running == 1)
    engine.allow(5)
    response = await opened
    await anext(response.aiter_lines())
    await response.aclose()
    await engine.until(lambda: engine.running == 0, seconds=1.5)
    assert engine.submissions[0].aborted == {0}


async def test_many_streams_at_once_leave_nothing_behind(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    before = len(asyncio.all_tasks())
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=30) as many:
        bodies = [CHAT | {"stream": True, "max_tokens": 20, "seed": i} for i in range(100)]
        streams = await asyncio.gather(*(all_events(many, "/v1/chat/completions", body) for body in bodies))
    assert len(streams) == 100
    assert all(events[-1]["choices"][0]["finish_reason"] == "length" for events in streams)
    assert engine.running == 0
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) <= before + 1


async def all_events(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> list[Any]:
    """Reads a whole stream; every chunk must be an event, the last one [DONE]."""
    async with client.stream("POST", route, json=body) as response:
        assert response.status_code == 200, await response.aread()
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]

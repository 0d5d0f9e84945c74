"""Two hundred streams at once over the base and more adapters than slots: no error, and nothing is left behind."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.config import EngineConfig, LoraPath
from gateway.app import create_app
from gateway.metrics import Metrics
from gateway.models import ModelRegistry
from gateway.prompt import PromptEncoder
from gateway.settings import Settings
from gateway.state import Gateway
from tests.e2e.conftest import ARENA_TOKENS, Files
from tests.e2e.server import Figures, Server, client_of, figures, load, names_of, serving, unload, until
from tests.gateway.harness import make_keeper, serve
from tests.support.adapters import write_adapter
from tests.support.engine import local_engine

STREAMS = 200
SETTLE_SECONDS = 10.0


def bodies(models: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Chats of different lengths, a third of them with an end that the client does not choose."""
    draw = random.Random(0)
    return [
        {
            "model": models[i % len(models)],
            "messages": [{"role": "user", "content": "tell me more " * draw.randint(1, 8)}],
            "max_tokens": draw.randint(tokens // 2, tokens),
            "ignore_eos": i % 3 > 0,
            "seed": i,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(STREAMS)
    ]


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Reads one stream to its end, which must be a good one."""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert not any("error" in chunk for chunk in chunks)
    usage = chunks[-1]["usage"]["completion_tokens"]
    reason = chunks[-2]["choices"][0]["finish_reason"]
    assert (reason, usage) == ("length", body["max_tokens"]) or (reason == "stop" and not body["ignore_eos"])


class Held:
    """Open files of the two processes of a server at one moment; a client's connections are among them."""

    def __init__(self, server: Server) -> None:
        processes = (psutil.Process(server.pid), server.engine)
        self.files = [process.num_fds() for process in processes]

    def fits(self, before: "Held") -> bool:
        """No more than before."""
        return all(now <= then for now, then in zip(self.files, before.files, strict=True))


async def settled(server: Server, before: Held) -> None:
    """Until both processes hold as few files as before; sockets close a moment after their clients."""
    async with asyncio.timeout(SETTLE_SECONDS):
        while not Held(server).fits(before):  # noqa: ASYNC110 - another process tells nobody
            await asyncio.sleep(0.05)


def idle(told: Figures) -> bool:
    return told("requests_running") + told("requests_waiting") + told("chunks", use="kv") == 0


def chunks(told: Figures) -> float:
    return sum(told("chunks", use=use) for use in ("kv", "prefix", "adapter", "free"))


def skips(told: Figures) -> float:
    """Sequences passed over in a step: their adapter was on its way, or found no slot."""
    return sum(told("skips_total", reason=reason) for reason in ("not_resident", "no_slot"))


@pytest.fixture
async def adapters(client: httpx.AsyncClient, files: Files, tmp_path: Path) -> AsyncIterator[list[str]]:
    """Nine more adapters than the shared server has, so that there are more than its eight slots."""
    names = [f"extra{i}" for i in range(9)]
    for i, name in enumerate(names):
        await load(client, name, write_adapter(tmp_path / name, files.model, rank=1 + 5 * i, seed=100 + i))
    yield names
    for name in names:
        await unload(client, name)
    told = await figures(client)
    assert told("slots_used") <= 3
    assert not any(name for name, labels in told.samples if dict(labels).get("adapter") in names)


async def test_two_hundred_streams(server: Server, client: httpx.AsyncClient, adapters: list[str]) -> None:
    models = names_of((await client.get("/v1/models")).json()["data"])
    assert len(models) == 13
    await read_stream(client, bodies(models, 4)[0])
    at_start = await until(client, idle, SETTLE_SECONDS)
    before = Held(server)
    async with server.client() as many:
        async with asyncio.timeout(120):
            await asyncio.gather(*(read_stream(many, body) for body in bodies(models, 32)))
    told = await until(client, idle, SETTLE_SECONDS)
    await settled(server, before)
    assert chunks(told) == chunks(at_start) > 0
    assert told("mixed_adapter_steps_total") > at_start("mixed_adapter_steps_total")
    assert skips(told) > skips(at_start)
    finished = sum(told("requests_finished_total", base="llama", reason=reason) for reason in ("stop", "length"))
    assert finished >= STREAMS
    assert told("engine_losses_total") == 0


async def test_half_of_two_hundred_are_abandoned(server: Server, client: httpx.AsyncClient) -> None:
    models = ["llama", "llama:lora0", "llama:lora1", "llama:lora2"]
    await until(client, idle, SETTLE_SECONDS)
    before = Held(server)
    async with server.client() as many:
        long = bodies(models, 300)  # still at it when the next figures are told
        calls = [asyncio.create_task(read_stream(many, body)) for body in long]
        await until(client, lambda told: told("requests_running") > 40, 30)
        for call in calls[::2]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert not [result for result in results[1::2] if result is not None]
    told = await until(client, idle, SETTLE_SECONDS)
    await settled(server, before)
    assert told("slots_used") <= 3


async def test_no_task_outlives_its_request(files: Files) -> None:
    """Gateway and engine in this process, behind a real socket, so that their tasks can be counted."""
    paths = tuple(LoraPath(name=f"lora{i}", path=str(path)) for i, path in enumerate((files.rank4, files.rank64)))
    config = EngineConfig(
        model_path=str(files.model),
        lora_paths=paths,
        max_total_tokens=ARENA_TOKENS,
        max_host_lora_bytes=2**26,
        threads=1,
    )
    async with local_engine(config) as local:
        settings, metrics = Settings(engine=config), Metrics()
        metrics.engine_started(local.client.model)
        gateway = Gateway(
            client=local.client,
            registry=ModelRegistry(local.client),
            prompts=PromptEncoder.load(files.model, local.client.model.vocab_size),
            settings=settings,
            metrics=metrics,
            keeper=make_keeper(),
        )
        async with serve(create_app(gateway, settings, metrics)) as address:
            models = ["llama", "llama:lora0", "llama:lora1"]
            await some_streams(address, bodies(models, 8)[:10])
            before = len(asyncio.all_tasks())
            await some_streams(address, bodies(models, 24))
            async with asyncio.timeout(SETTLE_SECONDS):
                while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - tasks end without a word
                    await asyncio.sleep(0.01)
            assert local.client.open_requests == 0
        await local.settled()
        stats = await local.stats()
        assert stats.chunks["kv"] == 0
        assert stats.counters["mixed_adapter_steps"] > 0


async def some_streams(address: str, asked: Sequence[dict[str, Any]]) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as client:
        await asyncio.gather(*(read_stream(client, body) for body in asked))


@pytest.mark.slow
@pytest.mark.demo
async def test_two_hundred_streams_of_the_demo(tmp_path: Path) -> None:
    """`loramux serve` as a newcomer starts it."""
    with serving(tmp_path / "log") as server:
        async with client_of(server) as client:
            models = names_of((await client.get("/v1/models")).json()["data"])
            await read_stream(client, bodies(models, 4)[0])
            at_start = await until(client, idle, SETTLE_SECONDS)
            before = Held(server)
            async with httpx.AsyncClient(
                base_url=server.url, timeout=900, limits=httpx.Limits(max_connections=None)
            ) as many:
                await asyncio.gather(*(read_stream(many, body) for body in bodies(models, 32)))
            told = await until(client, idle, SETTLE_SECONDS)
            await settled(server, before)
            assert chunks(told) == chunks(at_start)
            assert told("engine_losses_total") == 0

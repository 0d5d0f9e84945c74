"""Engines that die come back with what was served; neither a stopped nor a killed gateway leaves an engine behind."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import Server, client_of, figures, generate, launch, load, names_of, serving, unload, until
from tests.support.adapters import write_adapter

LONG: Any = {"model": "llama:lora0", "prompt": "hello", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
COME_BACK_SECONDS = 30.0


async def test_a_killed_engine_comes_back_with_what_was_served(files: Files, tmp_path: Path) -> None:
    pinned = json.dumps({"lora_name": "lora0", "lora_path": str(files.rank4), "pinned": True})
    limits = ("--max-lora-rank", "256", "--lora-target-modules", "all")
    with serving(tmp_path / "log", *files.flags, *limits, "--lora-paths", pinned, f"gone={files.rank4}") as server:
        async with client_of(server) as client:
            await load(client, "loaded", files.rank256)
            await load(client, "held", files.rank64, pinned=True)
            await unload(client, "gone")
            before = [await generate(client, "hello", name) for name in (None, "lora0", "loaded", "held")]
            requests = (await figures(client))("adapter_requests_total", base="llama", adapter="held")

            await streams_that_lose_their_engine(server, client)
            await healthy_again(client)

            models = names_of((await client.get("/v1/models")).json()["data"])
            assert sorted(models) == ["llama", "llama:held", "llama:loaded", "llama:lora0"]
            after = [await generate(client, "hello", name) for name in (None, "lora0", "loaded", "held")]
            assert after == before
            told = await until(client, lambda told: told("slots_pinned") == 2, 10)
            assert told("engine_losses_total") == 1
            assert told("engine_up") == 1
            assert told("requests_running") == 0
            assert told("adapter_requests_total", base="llama", adapter="held") > requests  # totals outlive engines
            for name in ("lora0", "held"):
                assert told("adapter_loaded", base="llama", adapter=name, tier="arena", pinned="true") == 1
            await load(client, "gone", files.rank4)
        assert server.stop() == 0
        assert "Traceback" not in server.text()


async def streams_that_lose_their_engine(server: Server, client: httpx.AsyncClient) -> None:
    """Streams end in one error event and [DONE], what is not streamed in a 503; health says so."""
    streams = [Stream(client, LONG | changes) for changes in ({}, {"n": 2}, {"model": "llama"})]
    sampling = {"max_new_tokens": 1900, "ignore_eos": True}
    whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
    native = asyncio.create_task(client.post("/generate", json={"text": ["a", "b"], "sampling_params": sampling}))
    await until(client, lambda told: told("requests_running") == 7, 10)
    for stream in streams:
        await asyncio.wait_for(stream.started.wait(), 10)
    server.engine.kill()
    for stream in streams:
        *events, last = await stream.lines()
        assert last == "[DONE]"
        assert ["error" in event for event in map(json.loads, events)] == [False] * (len(events) - 1) + [True]
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
    for response in (await whole, await native, await client.get("/health")):
        is_engine_dead(response)
    is_engine_dead(await client.post("/v1/completions", json=LONG))
    is_engine_dead(await client.post("/v1/completions", json=LONG | {"stream": True}))
    assert (await figures(client))("engine_up") == 0


def is_engine_dead(response: httpx.Response) -> None:
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"
    assert response.headers["retry-after"]


class Stream:
    """A streamed completion, read beside the test."""

    def __init__(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.started = asyncio.Event()  # its first event came
        self._task = asyncio.create_task(self._read(client, body | {"stream": True}))

    async def lines(self) -> list[str]:
        """The data of all events, once it has ended."""
        return await self._task

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
        lines = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                self.started.set()
                lines += [line.removeprefix("data: ")] if line.startswith("data: ") else []
        return lines


async def healthy_again(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(COME_BACK_SECONDS):
        while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110 - it is asked, it tells nobody
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
async def test_a_stopped_server_ends_its_streams_and_its_engine(files: Files, tmp_path: Path, number: int) -> None:
    """What is open gets the time that --shutdown-timeout allows, then one error event."""
    flags = ("--lora-paths", f"lora0={files.rank4}", "--shutdown-timeout", "0.3")
    with serving(tmp_path / "log", *files.flags, *flags) as server:
        engine = server.engine
        async with client_of(server) as client:
            stream = Stream(client, LONG)
            await asyncio.wait_for(stream.started.wait(), 10)
            assert await asyncio.to_thread(server.stop, number) == 0
            *_, last, done = await stream.lines()
        assert done == "[DONE]"
        assert json.loads(last)["error"]["code"] == "engine_dead"
        assert not is_running(engine)
        assert "Traceback" not in server.text()


async def test_a_killed_gateway_leaves_no_engine(files: Files, tmp_path: Path) -> None:
    flags = ("--lora-paths", f"lora0={files.rank4}")
    with serving(tmp_path / "log", *files.flags, *flags, env={"TMPDIR": str(tmp_path)}) as server:
        engine = server.engine
        async with client_of(server) as client:
            stream = Stream(client, LONG)
            await asyncio.wait_for(stream.started.wait(), 10)
            server.process.kill()
            with pytest.raises(httpx.HTTPError):
                await stream.lines()
        await asyncio.to_thread(psutil.wait_procs, [engine], timeout=5)
        assert not is_running(engine)
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith("loramux-")]


async def test_a_gateway_killed_while_weights_load_leaves_no_engine(files: Files, tmp_path: Path) -> None:
    process = launch(tmp_path / "log", *files.flags)
    try:
        gateway = psutil.Process(process.pid)
        async with asyncio.timeout(20):
            while not (children := gateway.children()):  # noqa: ASYNC110 - another process tells nobody
                await asyncio.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    await asyncio.to_thread(psutil.wait_procs, children, timeout=5)
    assert not any(is_running(child) for child in children)


@pytest.mark.slow
async def test_an_engine_that_stands_still_is_replaced(files: Files, tmp_path: Path) -> None:
    """Stopped, not dead: only the missing heartbeats tell."""
    with serving(tmp_path / "log", *files.flags, "--lora-paths", f"lora0={files.rank4}") as server:
        async with client_of(server) as client:
            before = await generate(client, "hello", "lora0")
            stopped = server.engine
            stopped.suspend()
            whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
            load_call = asyncio.create_task(
                client.post("/load_lora_adapter", json={"lora_name": "lora1", "lora_path": str(files.rank4)})
            )
            is_engine_dead(await whole)
            refused = await load_call
            assert (refused.status_code, refused.json()["success"]) == (503, False)
            await healthy_again(client)
            assert not is_running(stopped)
            assert await generate(client, "hello", "lora0") == before


@pytest.mark.slow
async def test_an_engine_that_dies_again_and_again_comes_back(files: Files, tmp_path: Path) -> None:
    """Also with an adapter whose files are gone: it stays listed, with its error, and the others are served."""
    away = write_adapter(tmp_path / "away", files.model, rank=4)
    paths = (f"lora0={files.rank4}", f"away={away}")
    with serving(tmp_path / "log", *files.flags, "--lora-paths", *paths) as server:
        async with client_of(server) as client:
            before = await generate(client, "hello", "lora0")
            for deaths in (1, 2, 3):
                server.engine.kill()
                await until(client, lambda told, deaths=deaths: told("engine_losses_total") == deaths, 10)  # type: ignore[misc]
                (away / "adapter_config.json").unlink(missing_ok=True)
                await healthy_again(client)
                assert await generate(client, "hello", "lora0") == before
            told = (await client.get("/v1/lora_adapters")).json()["data"]
            assert {adapter["name"]: adapter["state"] for adapter in told} == {"lora0": "resident", "away": "failed"}
            refused = await client.post("/v1/completions", json={"model": "llama:away", "prompt": "hello"})
            assert refused.status_code == 503
            assert "no adapter_config.json" in refused.json()["error"]["message"]
            assert "adapter 'away' cannot be loaded again" in server.text()


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

"""The server's life: start, announcement, signals, failures. The engine is a scripted process."""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from engine.types import EngineError
from gateway import server
from gateway.settings import Settings, SettingsError
from tests.gateway.test_supervisor import SCRIPT, Lives, is_gone
from tests.gateway.tokenizer_files import write_folder

LONG = {"model": "llama", "prompt": "hello", "max_tokens": 50, "stream": True}  # the scripted engine never ends it


class Running:
    """A server in this process's loop."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: str, **settings: Any) -> None:
        self.lives = Lives(tmp_path / "lives")
        self._settings = Settings(engine=EngineConfig(model_path=str(write_folder(tmp_path / "model"))), **settings)
        self._command = (sys.executable, SCRIPT, "--lives", lives, "--log", str(self.lives.log))
        self.announced: asyncio.Queue[str] = asyncio.Queue()
        monkeypatch.setattr(server, "announce", self.announced.put_nowait)
        self.listener = server.bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def __aenter__(self) -> httpx.AsyncClient:
        self.task = asyncio.create_task(server.serve(self._settings, self.listener, self._command))
        self.text = await self.announced.get()
        self._client = httpx.AsyncClient(base_url=self.url)
        return self._client

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()
        if not self.task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await self.code()

    async def code(self) -> int:
        async with asyncio.timeout(15):
            return await self.task


async def test_it_announces_itself_serves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(tmp_path, monkeypatch, "ready")
    async with running as client:
        assert f"{running.url}/v1" in running.text
        assert '"model": "llama"' in running.text
        body = {"model": "llama", "prompt": "hello", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "hello"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running.code() == 0
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
    assert is_gone(running.lives.pids[0])


async def test_what_is_no_http_is_answered_like_every_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(tmp_path, monkeypatch, "ready")
    async with running:
        reader, writer = await asyncio.open_connection(*running.listener.getsockname())
        writer.write(b"NOT HTTP\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nx-request-id: req-" in head
        assert f"content-length: {len(body)}".encode() in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_an_open_stream_that_outlasts_the_grace_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(tmp_path, monkeypatch, "ready", shutdown_timeout=0.2)
    async with running as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.aiter_lines()
        assert "hello" in await anext(lines)
        os.kill(os.getpid(), signal.SIGINT)
        rest = [line async for line in lines if line]
        assert '"engine_dead"' in rest[0]
        assert rest[1:] == ["data: [DONE]"]
        assert await running.code() == 0


async def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(tmp_path, monkeypatch, "ready", shutdown_timeout=3600)
    async with running as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        await anext(response.aiter_lines())
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert await running.code() == 0


async def test_streams_and_health_tell_of_a_dead_engine_and_service_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(tmp_path, monkeypatch, "ready")
    async with running as client:
        async with client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(running.lives.pids[0], signal.SIGKILL)
            rest = [line async for line in lines if line]
        assert '"engine_dead"' in rest[0]
        assert '"service_unavailable_error"' in rest[0]
        assert rest[1:] == ["data: [DONE]"]
        told = await client.get("/health")
        assert told.status_code == 503
        assert (await client.post("/v1/completions", json=LONG)).status_code == 503
        async with asyncio.timeout(15):
            while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110 - as a client would
                await asyncio.sleep(0.02)
        metrics = (await client.get("/metrics")).text
        assert "loramux_engine_losses_total 1.0" in metrics
        assert "loramux_engine_up 1.0" in metrics


async def test_a_signal_while_the_engine_starts_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(60)"
    settings = Settings(engine=EngineConfig())
    with server.bind("127.0.0.1", 0) as listener:
        task = asyncio.create_task(server.serve(settings, listener, (sys.executable, "-c", code)))
        async with asyncio.timeout(10):
            while not (pid.exists() and pid.read_text().endswith(".")):  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 128 + signal.SIGTERM
    assert is_gone(int(pid.read_text().rstrip(".")))


async def test_a_refused_start_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(tmp_path, monkeypatch, "refuse")
    with pytest.raises(EngineError, match="the reason"):
        await server.serve(running._settings, running.listener, running._command)


def test_an_address_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"--port {port}: .*in use"):
            server.bind("127.0.0.1", port)
    with pytest.raises(SettingsError, match=r"--host no\.such\.host\.invalid"):
        server.bind("no.such.host.invalid", 0)

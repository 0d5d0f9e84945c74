"""Starts and stops what a benchmark measures: a loramux server, and the transformers peer."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True, slots=True)
class Server:
    base_url: str
    seconds_to_ready: float
    pid: int


@contextlib.asynccontextmanager
async def loramux(*flags: str, threads: int, module: str = "gateway.cli") -> AsyncIterator[Server]:
    """A server as a user starts it, ready for requests. Its log goes to `server_log()`. module: run in its place."""
    port = _free_port()
    command = [sys.executable, "-m", module, "serve", "--port", str(port), "--threads", str(threads), *flags]
    start = time.perf_counter()
    process = _spawn(command)
    try:
        url = f"http://127.0.0.1:{port}"
        await _healthy(url, process)
        yield Server(url, time.perf_counter() - start, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@dataclass(frozen=True, slots=True)
class PeerProcess:
    process: "subprocess.Popen[str]"

    def run(self, items: list[tuple[str | None, list[int], int]], batch_size: int) -> float:
        """Seconds that the peer took for all items."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"items": items, "batch_size": batch_size}) + "\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the transformers peer died")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextlib.contextmanager
def transformers_peer(folder: str, dtype: str, adapters: dict[str, str], threads: int) -> Iterator[PeerProcess]:
    """transformers (and PEFT, with adapters) loaded in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.transformers_peer", "--model", folder, "--dtype", dtype]
    command += ["--threads", str(threads), *(f"--adapter={name}={path}" for name, path in adapters.items())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        peer = PeerProcess(process)
        peer._answer()
        yield peer
    finally:
        process.kill()
        process.wait()


def server_log() -> Path:
    return Path(tempfile.gettempdir()) / "loramux-bench.log"


def _spawn(command: list[str]) -> "subprocess.Popen[bytes]":
    with server_log().open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    async with httpx.AsyncClient() as client:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
    raise RuntimeError("the server exited before it was ready; see loramux-bench.log")

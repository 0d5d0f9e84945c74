"""`loramux serve` as users start it: a process of its own on a free port, ended with its engine whatever happens."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

COMMAND = (sys.executable, "-P", "-m", "gateway.cli", "serve")
READY = re.compile(r"ready at (http://\S+)/v1")
START_SECONDS = 60.0
POLL_SECONDS = 0.02
LOG_LINES = 60
Labels = tuple[tuple[str, str], ...]


class Server:
    """A gateway and its engine. `log` holds what both wrote."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.log = log
        self.url = ""
        self.process = process

    @classmethod
    def start(cls, log: Path, *flags: str | Path, env: dict[str, str] | None = None) -> Self:
        """Returns once it listens. Raises AssertionError, with the log, where it does not."""
        server = cls(launch(log, *flags, env=env), log)
        try:
            server.url = server._until_ready()
        except BaseException:
            server.kill()
            raise
        return server

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = psutil.Process(self.pid).children()
        return engine

    def client(self, *, seconds: float = 60, **headers: str) -> httpx.AsyncClient:
        """Any number of connections, kept open only as long as the client."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=seconds, limits=limits, trust_env=False)

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        """Asks it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Ends gateway and engine at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it in good order, or at once where that takes too long."""
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        self.kill()

    def _until_ready(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while (found := READY.search(self.text())) is None:
            assert self.process.poll() is None, f"the server ended at its start:\n{self.text()}"
            assert time.monotonic() < deadline, f"the server was not ready in time:\n{self.text()}"
            time.sleep(POLL_SECONDS)
        return found[1]


def launch(log: Path, *flags: str | Path, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Starts the command on a free port, both its outputs in `log`."""
    given = [str(flag) for flag in flags]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*COMMAND, "--port", "0", *given],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {}),
            cwd=log.parent,
        )


def refusal(log: Path, *flags: str | Path) -> str:
    """What a server says that refuses to start: one line, exit code 1 or 2."""
    process = launch(log, *flags)
    try:
        code = process.wait(START_SECONDS)
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert code in (1, 2), text
    assert "Traceback" not in text, text
    return next(line for line in text.splitlines() if line.startswith("loramux"))


@contextlib.contextmanager
def serving(log: Path, *flags: str | Path, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server for one test; its log is shown where the test fails."""
    server = Server.start(log, *flags, env=env)
    try:
        yield server
    except BaseException as error:
        error.add_note(log_tail(server))
        raise
    finally:
        server.close()


def log_tail(server: Server) -> str:
    return "\n".join(["the server's log:", *server.text().splitlines()[-LOG_LINES:]])


@dataclass(frozen=True)
class Figures:
    """One scrape of /metrics."""

    samples: dict[tuple[str, Labels], float]

    @classmethod
    async def of(cls, client: httpx.AsyncClient) -> Self:
        response = await client.get("/metrics")
        assert response.status_code == 200
        families = text_string_to_metric_families(response.text)
        return cls({(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples})

    def __call__(self, name: str, **labels: str) -> float:
        """A sample by its name without the prefix; 0 where there is none."""
        return self.samples.get((f"loramux_{name}", tuple(sorted(labels.items()))), 0.0)

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


async def figures(client: httpx.AsyncClient) -> Figures:
    return await Figures.of(client)


async def until(client: httpx.AsyncClient, reached: Callable[[Figures], bool], seconds: float) -> Figures:
    """The first scrape that `reached` accepts. Raises TimeoutError where none does in so long."""
    async with asyncio.timeout(seconds):
        while not reached(told := await figures(client)):  # noqa: ASYNC110 - another process tells by its metrics alone
            await asyncio.sleep(POLL_SECONDS)
    return told


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


async def generate(client: httpx.AsyncClient, text: Any, lora_path: Any = None, tokens: int = 12) -> Any:
    """A greedy call of /generate: its text, or its texts where `text` is a list."""
    body = {"text": text, "lora_path": lora_path, "sampling_params": {"max_new_tokens": tokens, "temperature": 0}}
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return [one["text"] for one in answer] if isinstance(answer, list) else answer["text"]


async def load(client: httpx.AsyncClient, name: str, source: Path, pinned: bool | None = None) -> dict[str, str]:
    """Loads an adapter; what is loaded then."""
    body = {"lora_name": name, "lora_path": str(source)} | ({} if pinned is None else {"pinned": pinned})
    return _loaded(await client.post("/load_lora_adapter", json=body))


async def unload(client: httpx.AsyncClient, name: str) -> dict[str, str]:
    """Unloads an adapter; what is loaded then."""
    return _loaded(await client.post("/unload_lora_adapter", json={"lora_name": name}))


def _loaded(response: httpx.Response) -> dict[str, str]:
    answer = response.json()
    assert response.status_code == 200, response.text
    assert answer["success"] is True
    assert answer["error_message"] is None
    loaded: dict[str, str] = answer["loaded_adapters"]
    return loaded


def names_of(models: Sequence[dict[str, Any]]) -> list[str]:
    return [model["id"] for model in models]

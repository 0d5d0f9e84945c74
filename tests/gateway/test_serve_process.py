"""`loramux serve` as users run it, on a tiny model: start, service, an engine's death, the gateway's death."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.adapters import write_adapter
from tests.support.models import write_model

SECONDS = 60.0  # how long anything may take on a busy machine


class Served:
    """A server in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.model = write_model(folder / "tiny")
        self.adapter = write_adapter(folder / "pirate", self.model, rank=4)
        flags = [
            "--model-path",
            str(self.model),
            "--lora-paths",
            f"sql={self.adapter}",
            "--port",
            "0",
            "--threads",
            "1",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve", *flags, "--max-total-tokens", "8192"],
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
        )
        self.client = httpx.Client(base_url=self._address(), timeout=SECONDS)

    def _address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line):
                return found[1]
        raise AssertionError("the server ended without an address")

    @property
    def engine(self) -> int:
        """The process id of the engine, the gateway's only child."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def complete(self, model: str) -> str:
        body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether the process has ended, collected or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.client.close()
    served.process.kill()
    served.process.wait()


def test_engine_and_gateway_may_die(served: Served) -> None:
    body = {"lora_name": "new", "lora_path": str(served.adapter), "pinned": True}
    assert served.client.post("/load_lora_adapter", json=body).json()["success"]
    texts = {model: served.complete(model) for model in ("tiny", "tiny:sql", "tiny:new")}
    assert texts["tiny:sql"] == texts["tiny:new"] != texts["tiny"]

    first = served.engine
    os.kill(first, signal.SIGKILL)
    until(lambda: served.client.get("/health").status_code == 503)
    until(lambda: served.client.get("/health").status_code == 200)
    assert {model: served.complete(model) for model in texts} == texts
    assert 'adapter="new",base="tiny",pinned="true"' in served.client.get("/metrics").text

    second = served.engine
    assert is_gone(first)
    assert second != first
    served.process.kill()
    until(lambda: is_gone(second))


def test_a_start_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "gateway.cli", "serve", "--model-path", str(tmp_path / "empty"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("loramux: error: ")]
    assert len(lines) == 1
    assert "config.json" in lines[0]
    assert "Traceback" not in done.stderr

"""Checkpoints made once, one server that most tests share, and a server's log beside every failure."""

from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from engine.models.dims import LORA_MODULES
from tests.e2e.server import Server, log_tail
from tests.support.adapters import write_adapter
from tests.support.browser import Browser, chromium
from tests.support.models import write_model

ARENA_TOKENS = 16384
FIVE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")


@dataclass(frozen=True)
class Files:
    """A tiny random base, and adapters for it with the ranks and modules of those in SGLang's page."""

    model: Path
    rank4: Path
    rank64: Path
    rank256: Path

    @property
    def flags(self) -> tuple[str | Path, ...]:
        """A server of the base alone, with little memory, so that it starts quickly."""
        small = ("--max-total-tokens", str(ARENA_TOKENS), "--max-host-lora-bytes", "64M", "--threads", "1")
        return ("--model-path", self.model, "--served-model-name", "llama", *small)

    def lora_paths(self) -> list[str]:
        """Three adapters, lora0 to lora2."""
        folders = (self.rank4, self.rank64, self.rank256)
        return [f"lora{i}={folder}" for i, folder in enumerate(folders)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("files")
    model = write_model(root / "tiny")
    return Files(
        model=model,
        rank4=write_adapter(root / "rank4", model, rank=4, modules=FIVE, seed=1),
        rank64=write_adapter(root / "rank64", model, rank=64, alpha=32, modules=LORA_MODULES, seed=2),
        rank256=write_adapter(root / "rank256", model, rank=256, alpha=64, modules=LORA_MODULES, seed=3),
    )


@pytest.fixture(scope="session")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The base and lora0 to lora2. Who uses it leaves it with just these."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = Server.start(log, *files.flags, "--lora-paths", *files.lora_paths())
    try:
        yield server
    finally:
        server.close()
    assert server.process.returncode == 0
    assert "Traceback" not in server.text(), server.text()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the shared server's log where a test fails that uses one."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for value in item.funcargs.values():
            if isinstance(value, Server):
                report.sections.append(("server", log_tail(value)))
    return report


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        browser.size(1400, 1000)
        yield browser

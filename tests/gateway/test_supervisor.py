"""An engine process that dies, hangs or refuses, and what its supervisor does about it."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from engine.config import EngineConfig, LoraPath
from engine.types import EngineError, ErrorCode, SamplingParams
from gateway import supervisor
from gateway.engine_process import EngineProcess
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.state import Gateway
from gateway.supervisor import Supervisor
from tests.gateway.harness import make_keeper
from tests.gateway.tokenizer_files import write_folder

SCRIPT = str(Path(__file__).with_name("fake_engine_process.py"))
PARAMS = SamplingParams(max_tokens=10, seed=0)


@dataclass
class Lives:
    """The engines that were started, in order."""

    log: Path

    def command(self, lives: str) -> tuple[str, ...]:
        return (sys.executable, SCRIPT, "--lives", lives, "--log", str(self.log))

    def _lines(self) -> list[list[str]]:
        return [line.split(" ", 1) for line in self.log.read_text().splitlines()]

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid, _ in self._lines()]

    @property
    def configs(self) -> list[EngineConfig]:
        return [msgspec.json.decode(config, type=EngineConfig) for _, config in self._lines()]


@pytest.fixture
def lives(tmp_path: Path) -> Lives:
    return Lives(tmp_path / "lives")


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model_path=str(write_folder(tmp_path / "model")), lora_paths=(LoraPath(name="sql", path="/sql"),)
    )


class Watched:
    """A supervisor at work, with the gateways that it published."""

    def __init__(self, config: EngineConfig, command: tuple[str, ...], silence: float = 5.0) -> None:
        self.metrics = Metrics()
        self.supervisor = Supervisor(
            Settings(engine=config),
            self.metrics,
            make_keeper(),
            command=command,
            silence=silence,
            check=0.02,
            backoff=0.01,
        )
        self.published: asyncio.Queue[Gateway] = asyncio.Queue()

    async def __aenter__(self) -> Gateway:
        gateway = await self.supervisor.start()
        self.supervisor.watch(self.published.put_nowait)
        return gateway

    async def __aexit__(self, *error: object) -> None:
        await self.supervisor.stop()

    async def next(self) -> Gateway:
        async with asyncio.timeout(15):
            return await self.published.get()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_it_starts_and_leaves_nothing(config: EngineConfig, lives: Lives) -> None:
    async with Watched(config, lives.command("ready")) as gateway:
        assert gateway.client.alive
        assert list(gateway.client.adapters) == ["sql"]
        assert gateway.prompts.tokenizer.encode("hello", add_special_tokens=False)
        assert lives.configs == [config]
    assert is_gone(lives.pids[0])


async def test_an_engine_that_comes_again_serves_though_its_warm_up_does_not_end(
    config: EngineConfig, lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(gateway: Gateway, settings: Settings) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(supervisor, "try_to_warm_up", never)
    monkeypatch.setattr(supervisor, "WARM_UP_SECONDS", 0.01)
    watched = Watched(config, lives.command("ready,ready"))
    async with watched:
        os.kill(lives.pids[0], signal.SIGKILL)
        assert (await watched.next()).client.alive


async def test_an_engine_that_dies_while_it_warms_up_is_replaced(
    config: EngineConfig, lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill(gateway: Gateway, settings: Settings) -> None:
        if len(lives.pids) == 2:
            os.kill(lives.pids[1], signal.SIGKILL)
            await asyncio.Event().wait()

    monkeypatch.setattr(supervisor, "try_to_warm_up", kill)
    watched = Watched(config, lives.command("ready,ready,ready"))
    async with watched:
        os.kill(lives.pids[0], signal.SIGKILL)
        while not (await watched.next()).client.alive:
            pass
        assert len(lives.pids) == 3


async def test_the_figures_tell_of_a_lost_engine_before_its_process_has_ended(
    config: EngineConfig, lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(config, lives.command("ready,ready"))
    told: list[bool] = []
    kill = EngineProcess.kill

    async def note(process: EngineProcess) -> int:
        told.append(b"loramux_engine_up 0.0" in watched.metrics.render()[0])
        return await kill(process)

    async with watched:
        monkeypatch.setattr(EngineProcess, "kill", note)
        os.kill(lives.pids[0], signal.SIGKILL)
        await watched.next()
        assert told == [True]


async def test_a_thousand_adapters_are_not_too_many(config: EngineConfig, lives: Lives) -> None:
    paths = tuple(LoraPath(name=f"adapter-{i}", path="/adapters/" + "x" * 200 + str(i)) for i in range(1000))
    config = msgspec.structs.replace(config, lora_paths=paths)
    async with Watched(config, lives.command("ready")) as gateway:
        assert len(gateway.client.adapters) == 1000


async def test_a_refusal_is_raised_with_its_reason(config: EngineConfig, lives: Lives) -> None:
    with pytest.raises(EngineError, match="the reason"):
        await EngineProcess.start(config, lives.command("refuse"))
    assert is_gone(lives.pids[0])


async def test_a_death_at_start_is_told_with_its_exit_code(config: EngineConfig, lives: Lives) -> None:
    with pytest.raises(EngineError, match="exit code 3") as caught:
        await EngineProcess.start(config, lives.command("exit"))
    assert caught.value.code is ErrorCode.ENGINE_DEAD


async def test_a_cancelled_start_leaves_no_process(config: EngineConfig, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(60)"
    start = asyncio.create_task(EngineProcess.start(config, (sys.executable, "-c", code)))
    async with asyncio.timeout(10):
        while not (pid.exists() and pid.read_text().endswith(".")):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert is_gone(int(pid.read_text().rstrip(".")))


async def test_a_broken_tokenizer_is_a_start_error(config: EngineConfig, lives: Lives, tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    supervisor = Supervisor(Settings(engine=config), Metrics(), make_keeper(), command=lives.command("ready"))
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        await supervisor.start()
    await supervisor.stop()
    assert is_gone(lives.pids[0])


@pytest.mark.parametrize("template", ["{% if %}", "/no/such/file"])
async def test_a_broken_template_is_a_start_error(config: EngineConfig, lives: Lives, template: str) -> None:
    settings = Settings(engine=config, chat_template=template)
    supervisor = Supervisor(settings, Metrics(), make_keeper(), command=lives.command("ready"))
    with pytest.raises(EngineError, match="template"):
        await supervisor.start()
    await supervisor.stop()


async def test_a_dead_engine_is_replaced_with_what_was_served(config: EngineConfig, lives: Lives) -> None:
    watched = Watched(config, lives.command("ready"))
    async with watched as gateway:
        await gateway.client.load_adapter("new", "org/new", pinned=True)
        await gateway.client.load_adapter("brief", "org/brief")
        await gateway.client.unload_adapter("brief")
        await gateway.client.load_adapter("swapped", "org/first", revision="v1")
        await gateway.client.load_adapter("swapped", "org/second", revision="v2", inplace=True)
        await gateway.client.pin_adapter("sql", True)
        os.kill(lives.pids[0], signal.SIGKILL)
        again = await watched.next()
        assert not gateway.client.alive
        assert again.client.alive
        restored = {name: (a.source, a.revision, a.pinned) for name, a in again.client.adapters.items()}
        swapped = ("org/second", "v2", False)  # the last version
        assert restored == {"sql": ("/sql", None, True), "new": ("org/new", None, True), "swapped": swapped}
        second = lives.configs[1]
        assert (second.max_lora_rank, second.lora_target_modules, second.enable_lora) == (64, ("q_proj",), True)
        os.kill(lives.pids[1], signal.SIGKILL)
        assert set((await watched.next()).client.adapters) == {"sql", "new", "swapped"}
    assert all(map(is_gone, lives.pids))


async def test_open_requests_fail_when_the_engine_dies(config: EngineConfig, lives: Lives) -> None:
    watched = Watched(config, lives.command("ready"))
    async with watched as gateway:
        async with gateway.client.generate(prompt=[5], params=PARAMS) as generation:
            outputs = aiter(generation)
            assert (await anext(outputs))[0].tokens == [5]
            os.kill(lives.pids[0], signal.SIGKILL)
            with pytest.raises(EngineError) as caught:
                await anext(outputs)
        assert caught.value.code is ErrorCode.ENGINE_DEAD
        await watched.next()
        with pytest.raises(EngineError):  # the old gateway never speaks to the new engine
            gateway.client.generate(prompt=[5], params=PARAMS)


@pytest.mark.parametrize("kind", ["silent", "hung"])
async def test_a_hung_engine_is_killed_and_replaced(config: EngineConfig, lives: Lives, kind: str) -> None:
    watched = Watched(config, lives.command(f"{kind},ready"), silence=0.5)
    async with watched:
        again = await watched.next()
        assert again.client.alive
        assert is_gone(lives.pids[0])


async def test_a_start_that_fails_is_tried_again(config: EngineConfig, lives: Lives) -> None:
    watched = Watched(config, lives.command("ready,exit,exit,ready"))
    async with watched:
        os.kill(lives.pids[0], signal.SIGKILL)
        await watched.next()
        assert len(lives.pids) == 4


async def test_no_adapter_keeps_a_server_from_coming_back(config: EngineConfig, lives: Lives) -> None:
    watched = Watched(config, lives.command("ready"))
    async with watched:
        os.kill(lives.pids[0], signal.SIGKILL)
        assert list((await watched.next()).client.adapters) == ["sql"]
    first, second = lives.configs
    assert (first.lora_paths, first.lora_restored) == (config.lora_paths, ())
    assert second.lora_paths == (), "of these a failure is a refusal to start"
    assert [entry.name for entry in second.lora_restored] == ["sql"]


async def test_the_engine_gets_no_secret(config: EngineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAMUX_API_KEY", "s3cret")
    code = f"import os; open({str(tmp_path / 'env')!r}, 'w').write(str(dict(os.environ)))"
    with pytest.raises(EngineError):
        await EngineProcess.start(config, (sys.executable, "-c", code))
    assert "s3cret" not in (tmp_path / "env").read_text()


@pytest.fixture(autouse=True)
async def no_leftover_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Sockets lie in folders of their own, which go with their engine."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []

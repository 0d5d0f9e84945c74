"""--lora-preload and --lora-warm over the scripted engine."""

from pathlib import Path

import msgspec
import pytest

from engine.config import EngineConfig
from engine.types import ADAPTER_FILES, AdapterState, EngineError
from gateway.lazy import Lazy
from gateway.models import ModelRegistry
from gateway.settings import Settings
from gateway.state import Gateway
from gateway.warmup import try_to_warm_up, warm_up
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.harness import make_gateway
from tests.gateway.tokenizer_files import write_folder


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(adapters=["sql"])


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Gateway:
    folder = tmp_path / "adapters" / "lying"
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        (folder / name).touch()
    registry = ModelRegistry(engine, Lazy(tmp_path / "adapters", [], lambda: 0.0))
    made = make_gateway(engine, write_folder(tmp_path / "model"))
    return Gateway(made.client, registry, made.prompts, made.settings, made.metrics, made.keeper)


def settings(preload: tuple[str, ...] = (), warm: tuple[str, ...] = ()) -> Settings:
    return Settings(engine=EngineConfig(), lora_preload=preload, lora_warm=warm)


def kinds(engine: FakeEngine) -> list[str]:
    return [f"{kind} {call['name']}" for kind, call in engine.calls]


async def test_what_is_on_the_host_is_left_as_it_is(engine: FakeEngine, gateway: Gateway) -> None:
    await warm_up(gateway, settings(preload=("sql",)))
    assert kinds(engine) == []


async def test_what_is_cold_or_lies_in_the_folder_is_read(engine: FakeEngine, gateway: Gateway) -> None:
    engine.adapters["sql"] = msgspec.structs.replace(engine.adapters["sql"], state=AdapterState.COLD)
    await warm_up(gateway, settings(preload=("sql", "lying")))
    assert kinds(engine) == ["load sql", "offer lying"]
    assert {adapter.state for adapter in engine.adapters.values()} == {AdapterState.HOST}


async def test_warm_ones_are_pinned_for_a_moment(
    engine: FakeEngine, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins: list[tuple[str, bool]] = []
    pin = engine.pin_adapter

    async def note(name: str, pinned: bool) -> object:
        pins.append((name, pinned))
        return await pin(name, pinned)

    monkeypatch.setattr(engine, "pin_adapter", note)
    await engine.load_adapter("held", "/held", pinned=True)
    await warm_up(gateway, settings(warm=("sql", "held", "lying")))
    assert pins == [("sql", True), ("sql", False), ("lying", True), ("lying", False)], "what is pinned stays so"


@pytest.mark.parametrize("flag", ["--lora-preload", "--lora-warm"])
async def test_a_name_that_is_none_names_its_flag(gateway: Gateway, flag: str) -> None:
    wanted = settings(preload=("none",)) if flag == "--lora-preload" else settings(warm=("none",))
    with pytest.raises(EngineError, match=rf"{flag} none: .*does not exist"):
        await warm_up(gateway, wanted)
    await try_to_warm_up(gateway, wanted)  # an engine that comes again serves without it

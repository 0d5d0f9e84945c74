"""What the admin's routes change is in the file before they answer, and what a start makes of it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig, LoraPath
from engine.types import AdapterState, EngineError, ErrorCode
from gateway import lora_state
from gateway.keeper import Keeper
from gateway.settings import Settings, SettingsError
from tests.gateway.app_harness import App, make_app
from tests.gateway.fake_engine import FakeEngine

PATHS = (LoraPath(name="sql", path="/adapters/sql"),)


def settings(tmp_path: Path, **changes: Any) -> Settings:
    told = {"lora_state": str(tmp_path / "state.json"), "lora_spool_dir": str(tmp_path / "spool")} | changes
    return Settings(engine=EngineConfig(lora_paths=PATHS), **told)


def app_of(tmp_path: Path, keeper: Keeper) -> App:
    app = make_app(tmp_path, FakeEngine(adapters=["sql"]))
    gateway = app.asgi.state.gateway
    app.asgi.state.gateway = type(gateway)(
        gateway.client, gateway.registry, gateway.prompts, gateway.settings, gateway.metrics, keeper
    )
    return app


def restored(tmp_path: Path) -> EngineConfig:
    with Keeper.open(settings(tmp_path)) as keeper:
        return keeper.start_config(settings(tmp_path).engine, preload={"b"})


async def test_every_change_is_in_the_file_when_it_is_answered(tmp_path: Path) -> None:
    with Keeper.open(settings(tmp_path)) as keeper:
        async with app_of(tmp_path, keeper).client() as client:
            for path, body in (
                ("/load_lora_adapter", {"lora_name": "a", "lora_path": "org/a", "pinned": True, "weight": 2}),
                ("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "org/b"}),
                ("/pin_lora_adapter", {"lora_name": "b"}),
                ("/load_lora_adapter", {"lora_name": "c", "lora_path": "org/c"}),
                ("/v1/unload_lora_adapter", {"lora_name": "c"}),
                ("/unload_lora_adapter", {"lora_name": "sql"}),
                ("/unpin_lora_adapter", {"lora_name": "a"}),
            ):
                assert (await client.post(path, json=body)).status_code == 200
                assert lora_state.read(tmp_path / "state.json") == keeper.state
            refused = await client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "org/other"})
            assert refused.status_code == 400
            assert lora_state.read(tmp_path / "state.json") == keeper.state
    config = restored(tmp_path)
    assert config.lora_paths == ()
    assert config.lora_restored == (
        LoraPath(name="a", path="org/a", weight=2.0),
        LoraPath(name="b", path="org/b", pinned=True, preload=True),
    )


async def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, state: lora_state.State) -> None:
        raise OSError(28, "No space left on device")

    with Keeper.open(settings(tmp_path)) as keeper:
        app = app_of(tmp_path, keeper)
        monkeypatch.setattr(lora_state, "write", full)
        async with app.client() as client:
            response = await client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "org/a"})
        assert (response.status_code, response.json()["error"]["code"]) == (507, "state_not_written")
        assert "a" in app.engine.adapters


def test_a_start_tells_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    wanted = settings(tmp_path, lora_state=str(tmp_path / "none" / "state.json"))
    with pytest.raises(SettingsError, match=r"--lora-state .*cannot be written"), Keeper.open(wanted):
        pass


@pytest.mark.parametrize(
    "entry", [lora_state.Loaded(name="llama", source="s"), lora_state.Loaded(name="a..b", source="s")]
)
def test_names_that_no_adapter_may_bear_are_refused(tmp_path: Path, entry: lora_state.Loaded) -> None:
    state = lora_state.with_loaded(lora_state.fresh(), entry, ())
    lora_state.write(tmp_path / "state.json", state)
    with pytest.raises(SettingsError, match="--lora-state"), Keeper.open(settings(tmp_path)):
        pass


def test_an_entry_without_a_source_is_refused(tmp_path: Path) -> None:
    state = lora_state.with_loaded(lora_state.fresh(), lora_state.Loaded(name="a"), ())
    lora_state.write(tmp_path / "state.json", state)
    with pytest.raises(SettingsError, match="has no source"), Keeper.open(settings(tmp_path)):
        pass


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    state = lora_state.with_loaded(lora_state.fresh(), lora_state.Loaded(name="a", source="s"), ())
    lora_state.write(tmp_path / "state.json", msgspec.structs.replace(state, adapters=state.adapters * 2))
    with pytest.raises(SettingsError, match="two adapters bear one name"), Keeper.open(settings(tmp_path)):
        pass


def test_what_a_server_that_died_while_it_wrote_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"state.json.{'0' * 32}.part"
    others = [tmp_path / name for name in ("state.json.part", "other.json." + "0" * 32 + ".part")]
    for path in (left, *others):
        path.write_text("{")
    with Keeper.open(settings(tmp_path)):
        assert not left.exists()
        assert all(path.exists() for path in others)


async def test_an_unload_that_the_engine_did_not_survive_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine that is started instead does not have it, so nor may the next server."""

    async def die(*args: Any, **kwargs: Any) -> None:
        old = app.engine.adapters["a"]
        app.engine.adapters["a"] = msgspec.structs.replace(old, state=AdapterState.DRAINING)
        app.engine.alive = False
        raise EngineError(ErrorCode.ENGINE_DEAD, "the engine stopped")

    with Keeper.open(settings(tmp_path)) as keeper:
        app = app_of(tmp_path, keeper)
        async with app.client() as client:
            await client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "org/a"})
            monkeypatch.setattr(app.engine, "unload_adapter", die)
            response = await client.post("/unload_lora_adapter", json={"lora_name": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert keeper.state.adapters == ()


async def test_a_pin_that_came_too_late_leaves_an_adapter_that_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Keeper.open(settings(tmp_path)) as keeper:
        app = app_of(tmp_path, keeper)
        load = app.engine.load_adapter

        async def late(*args: Any, **kwargs: Any) -> None:
            await load(*args, **kwargs | {"pinned": False})
            raise EngineError(ErrorCode.ADAPTER_UNAVAILABLE, "it is not pinned")

        async with app.client() as client:
            body = {"lora_name": "a", "lora_path": "org/a", "pinned": True}
            monkeypatch.setattr(app.engine, "load_adapter", late)
            assert (await client.post("/load_lora_adapter", json=body)).status_code == 503
            assert [(entry.name, entry.pinned) for entry in keeper.state.adapters] == [("a", False)]
            taken = await client.post("/load_lora_adapter", json=body | {"lora_name": "sql"})
            assert taken.json()["error"]["code"] == "adapter_exists"
            assert [entry.name for entry in keeper.state.adapters] == ["a"]


def test_without_a_state_nothing_is_written(tmp_path: Path) -> None:
    with Keeper.open(settings(tmp_path, lora_state=None)) as keeper:
        assert keeper.start_config(EngineConfig(lora_paths=PATHS)) == EngineConfig(lora_paths=PATHS)
    assert list(tmp_path.iterdir()) == []

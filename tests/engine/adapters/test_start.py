"""What an engine loads at its start, what was served before among it; and adapters that are offered later."""

from pathlib import Path

import pytest

from engine.adapters.hub import Hub
from engine.adapters.snapshot import RepositoryMissing
from engine.config import LoraPath
from engine.types import AdapterState, EngineError, ErrorCode, FinishReason
from tests.engine.loop_harness import harness


def path(name: str, *, pinned: bool = False, preload: bool = False) -> LoraPath:
    return LoraPath(name=name, path=name, pinned=pinned, preload=preload, weight=2.0)


async def test_what_was_served_before_comes_after_the_flags_and_a_failure_is_listed_with_its_reason() -> None:
    restored = [path("b"), path("gone"), path("c", pinned=True)]
    sources = {"a": "one", "b": "two", "c": "three"}
    async with harness(paths=[path("a")], restored=restored, sources=sources) as engine:
        adapters = engine.client.adapters
        assert list(adapters) == ["a", "b", "gone", "c"]
        states = {name: adapter.state for name, adapter in adapters.items()}
        host = AdapterState.HOST
        assert states == {"a": host, "b": host, "gone": AdapterState.FAILED, "c": host}
        assert adapters["gone"].error == "gone is not there"
        assert adapters["c"].pinned
        assert adapters["b"].weight == 2.0
        with pytest.raises(EngineError, match="gone is not there") as failed:
            await engine.ask("gone")
        assert failed.value.code is ErrorCode.ADAPTER_UNAVAILABLE
        assert (await engine.ask("b")).finish is FinishReason.LENGTH


async def test_a_restored_pin_that_is_not_allowed_any_more_is_dropped() -> None:
    names = ("a", "b", "c")
    restored = [path(name, pinned=True) for name in names]
    async with harness(restored=restored, sources=dict.fromkeys(names, "one"), max_slots=2) as engine:
        assert [adapter.pinned for adapter in engine.client.adapters.values()] == [True, False, False]
        assert all(adapter.state is not AdapterState.FAILED for adapter in engine.client.adapters.values())


async def test_preloaded_ones_have_room_before_those_ahead_of_them() -> None:
    sources = {"a": "one", "b": "two", "c": "three", "d": "four"}
    paths = [path("a"), path("b"), path("c", preload=True)]
    async with harness(paths=paths, restored=[path("d", preload=True)], sources=sources, max_loaded=3) as engine:
        states = [adapter.state for adapter in engine.client.adapters.values()]
        assert states == [AdapterState.HOST, AdapterState.COLD, AdapterState.HOST, AdapterState.HOST]


async def test_an_offered_adapter_is_read_when_it_is_named() -> None:
    async with harness(sources={"a": "one"}) as engine:
        info = await engine.client.offer_adapter("a", "a")
        assert info.state is AdapterState.COLD
        assert engine.reader.reads == []
        assert (await engine.ask("a")).finish is FinishReason.LENGTH
        assert (await engine.client.offer_adapter("a", "elsewhere")).adapter_id == info.adapter_id
        assert engine.client.adapters["a"].source == "a"
        with pytest.raises(EngineError):
            await engine.client.offer_adapter("../up", "a")


async def test_an_offered_adapter_that_is_broken_fails_who_asks_and_stays_listed() -> None:
    async with harness() as engine:
        await engine.client.offer_adapter("a", "gone")
        with pytest.raises(EngineError, match="gone is not there"):
            await engine.ask("a")
        await engine.told()
        assert engine.client.adapters["a"].state is AdapterState.FAILED


async def test_offers_from_the_hub_are_fetched_first(tmp_path: Path) -> None:
    async def offer(name: str) -> EngineError | None:
        try:
            await engine.client.offer_adapter(name, f"hub:{name}")
        except EngineError as error:
            return error
        return None

    fetched: list[str] = []

    def fetch(repo: str, revision: str | None) -> Path:
        fetched.append(repo)
        if repo == "o/missing":
            raise RepositoryMissing("no such repository")
        if repo == "o/broken":
            raise OSError("no route to host")
        return tmp_path

    async with harness(sources={str(tmp_path): "one"}, hub=Hub(fetch=fetch)) as engine:
        assert await offer("o/there") is None
        missing, broken = await offer("o/missing"), await offer("o/broken")
        assert missing is not None
        assert missing.code is ErrorCode.ADAPTER_NOT_FOUND
        assert broken is not None
        assert broken.code is ErrorCode.ADAPTER_UNAVAILABLE
        assert list(engine.client.adapters) == ["o/there"]
        assert fetched == ["o/there", "o/missing", "o/broken"]
        (tmp_path / "adapter_config.json").touch()
        (tmp_path / "adapter_model.safetensors").touch()
        assert (await engine.ask("o/there")).finish is FinishReason.LENGTH
        assert fetched[3:] == [], "what is there is not fetched again"


async def test_who_left_the_host_is_told_to_be_cold() -> None:
    names = {"a": "one", "b": "two"}
    async with harness(paths=[path("a"), path("b")], sources=names, max_loaded=1, max_slots=1) as engine:
        told = [engine.client.adapters["a"].state]
        await engine.ask("b")
        await engine.told()
        told.append(engine.client.adapters["a"].state)
        assert told == [AdapterState.HOST, AdapterState.COLD]


async def test_a_version_that_gave_way_is_told_when_nothing_is_left_of_it() -> None:
    async with harness(sources={"a": "one", "b": "two"}) as engine:
        gone: list[int] = []
        engine.client.on_removed = gone.append
        first = (await engine.client.load_adapter("a", "a")).adapter_id
        second = (await engine.client.load_adapter("a", "b", inplace=True)).adapter_id
        assert second != first
        await engine.told()
        assert gone == [first]
        assert engine.client.adapters["a"].adapter_id == second

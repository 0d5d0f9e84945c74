"""First loads that fail: nothing of them stays, for whoever waits and in what the gateway was told."""

import asyncio

import pytest

from engine.config import LoraPath
from engine.types import EngineError, ErrorCode
from tests.engine.loop_harness import harness


async def test_a_pin_that_waits_for_a_load_is_told_when_it_fails() -> None:
    async with harness() as engine:
        gate = engine.reader.hold("a")
        loading = asyncio.create_task(engine.client.load_adapter("a", "a"))
        await engine.reader.reading.wait()
        pinning = asyncio.create_task(engine.client.pin_adapter("a", True))
        await engine.told()
        assert list(engine.client.adapters) == ["a"]
        gate.set()
        for waiting in (loading, pinning):
            with pytest.raises(EngineError, match="a is not there"):
                await asyncio.wait_for(waiting, 10)
        await engine.told()
        assert engine.client.adapters == {}


@pytest.mark.parametrize("pins", [0, 2])
async def test_a_failed_adapter_whose_name_was_given_away_in_vain_is_gone(pins: int) -> None:
    held = [LoraPath(name=f"held{i}", path="held", pinned=True) for i in range(pins)]
    lost = LoraPath(name="lost", path="lost")
    async with harness(restored=[*held, lost], sources={"held": "one"}, max_slots=3) as engine:
        old = engine.client.adapters["lost"]
        gone: list[int] = []
        engine.client.on_removed = gone.append
        with pytest.raises(EngineError):
            await engine.client.load_adapter("lost", "nowhere", pinned=pins > 0)
        await engine.told()
        assert gone[0] == old.adapter_id
        assert "lost" not in engine.client.adapters
        with pytest.raises(EngineError) as refused:
            await engine.client.unload_adapter("lost")
        assert refused.value.code is ErrorCode.ADAPTER_NOT_FOUND


async def test_a_failure_of_the_file_system_is_told_without_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(source: str, revision: str | None) -> None:
        raise OSError(5, "Input/output error", "/home/operator/.cache/blob")

    async with harness() as engine:
        monkeypatch.setattr(engine.reader, "read", read)
        with pytest.raises(EngineError) as failed:
            await engine.client.load_adapter("a", "a")
        assert failed.value.message == "OSError: Input/output error"

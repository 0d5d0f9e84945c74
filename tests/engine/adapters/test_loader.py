"""Loads, fetches, unloads and pins through the loop, with sources and copies that a test holds or breaks."""

import asyncio
import threading

import pytest

from engine.config import LoraPath
from engine.types import AdapterState, EngineError, ErrorCode, FinishReason
from tests.engine.loop_harness import CONTEXT, PAGES, Harness, harness, params

THREE = {"x": "zero", "a": "one", "b": "two"}


def code_of(failure: object) -> ErrorCode:
    assert isinstance(failure, EngineError), failure
    return failure.code


def state(engine: Harness, name: str) -> AdapterState:
    return engine.scheduler.adapters.info(name).state


def paths(*names: str, pinned: tuple[str, ...] = ()) -> list[LoraPath]:
    return [LoraPath(name=name, path=name, pinned=name in pinned) for name in names]


async def freed(engine: Harness, name: str) -> None:
    """The adapter is gone from every tier and from the gateway's list."""
    await engine.told()
    stats = await engine.client.stats()
    assert name not in engine.client.adapters
    assert [a.name for a in stats.adapters] == [""]
    assert stats.chunks["adapter"] == stats.tier_bytes["host"] == 0
    assert engine.host.adapters == {}
    await engine.until(lambda: engine.scheduler.idle)
    await engine.ask()  # the worker hears of what left before the next plan
    assert engine.worker.resident == {}


# Loads


async def test_the_same_load_twice_is_one() -> None:
    async with harness(sources={"a": "one"}) as engine:
        gate = engine.reader.hold("a")
        loads = [asyncio.create_task(engine.load("a")) for _ in range(3)]
        await engine.reader.reading.wait()
        await engine.told()
        gate.set()
        assert len(set(await asyncio.gather(*loads))) == 1
        assert engine.reader.reads == ["a"]
        assert state(engine, "a") is AdapterState.HOST


async def test_the_same_load_twice_fails_once_for_both() -> None:
    async with harness() as engine:
        gate = engine.reader.hold("gone")
        loads = [asyncio.create_task(engine.client.load_adapter("a", "gone")) for _ in range(2)]
        await engine.reader.reading.wait()
        await engine.told()
        gate.set()
        failures = await asyncio.gather(*loads, return_exceptions=True)
        assert [code_of(failure) for failure in failures] == [ErrorCode.ADAPTER_INVALID] * 2
        assert engine.reader.reads == ["gone"]
        assert engine.scheduler.adapters.infos() == []
        await engine.load("a")
        assert (await engine.ask("a")).finish is FinishReason.LENGTH


async def test_another_load_of_a_name_is_refused() -> None:
    async with harness(sources={"a": "one", "b": "two"}) as engine:
        gate = engine.reader.hold("a")
        loading = asyncio.create_task(engine.load("a"))
        await engine.reader.reading.wait()
        with pytest.raises(EngineError, match="being loaded already"):
            await engine.client.load_adapter("a", "b")
        gate.set()
        await loading
        with pytest.raises(EngineError, match="loaded already"):
            await engine.load("a")


async def test_a_fault_of_ours_is_told_and_leaves_nothing() -> None:
    async with harness(sources={"a": "fault"}) as engine:
        with pytest.raises(EngineError, match="RuntimeError: a fault of ours") as failed:
            await engine.load("a")
        assert failed.value.code is ErrorCode.INTERNAL
        assert engine.scheduler.adapters.infos() == []
        assert engine.host.adapters == {}


async def test_a_load_stops_nobody() -> None:
    async with harness(sources={"a": "one"}) as engine:
        gate = engine.reader.hold("a")
        loading = asyncio.create_task(engine.load("a"))
        await engine.reader.reading.wait()
        assert (await engine.ask(max_tokens=30)).tokens == [7] * 30
        assert not loading.done()
        gate.set()
        await loading


# Start


async def test_start_loads_what_fits_and_lists_the_rest() -> None:
    sources = {"a": "one", "b": "two", "c": "three", "d": "four"}
    async with harness(paths=paths(*sources, pinned=("d",)), sources=sources, max_loaded=3) as engine:
        await engine.told()
        assert engine.reader.reads == ["a", "b", "c", "d"], "all are checked"
        assert state(engine, "c") is AdapterState.COLD, "the pinned one behind it counts"
        assert list(engine.client.adapters) == list(sources)
        assert (await engine.ask("c")).finish is FinishReason.LENGTH
        assert state(engine, "d") is AdapterState.RESIDENT


@pytest.mark.parametrize("max_loaded", [None, 1])
async def test_start_names_the_path_that_is_bad(max_loaded: int | None) -> None:
    with pytest.raises(EngineError, match="--lora-paths b=b: b is not there"):
        async with harness(paths=paths("a", "b"), sources={"a": "one"}, max_loaded=max_loaded):
            pass


# Fetches


async def test_a_failing_fetch_fails_those_who_wait_and_nobody_else() -> None:
    async with harness(paths=paths("a", "b"), sources={"a": "one", "b": "two"}, max_loaded=1, max_slots=1) as engine:
        gate = engine.reader.hold("b")
        engine.reader.reading.clear()
        waiting = [asyncio.create_task(engine.ask("b")) for _ in range(2)]
        await engine.reader.reading.wait()
        assert (await engine.ask(max_tokens=20)).tokens == [7] * 20
        del engine.reader.sources["b"]
        gate.set()
        for failure in await asyncio.gather(*waiting, return_exceptions=True):
            assert code_of(failure) is ErrorCode.ADAPTER_UNAVAILABLE
            assert "b is not there" in str(failure)
        assert state(engine, "b") is AdapterState.FAILED
        await engine.told()
        assert engine.client.adapters["b"].error == "b is not there"
        assert (await engine.ask("a")).finish is FinishReason.LENGTH
        engine.reader.sources["b"] = "two"
        reads = len(engine.reader.reads)
        for _ in range(3):
            with pytest.raises(EngineError, match="could not be loaded: b is not there") as refused:
                await engine.ask("b")
            assert code_of(refused.value) is ErrorCode.ADAPTER_UNAVAILABLE
        assert len(engine.reader.reads) == reads, "the failure is remembered"
        engine.scheduler.adapters.catalog.named("b").retry_at = 0.0  # its time is over
        assert (await engine.ask("b")).finish is FinishReason.LENGTH, "naming it again tries again"


async def test_a_changed_source_is_another_adapter() -> None:
    async with harness(paths=paths("a", "b"), sources={"a": "one", "b": "two"}, max_loaded=1, max_slots=1) as engine:
        await engine.ask("a", prompt=40)
        first = engine.client.adapters["a"].adapter_id
        await engine.ask("b")  # takes the only place on the host
        engine.reader.sources["a"] = "another"
        waited = asyncio.create_task(engine.ask("a", prompt=40))
        assert (await waited).finish is FinishReason.LENGTH
        await engine.told()
        renewed = engine.client.adapters["a"].adapter_id
        assert renewed != first
        assert engine.host.adapters == {renewed: "another"}
        assert (await engine.client.stats()).counters["prefix_hit_tokens"] == 0
        await engine.ask("a", prompt=40)
        assert (await engine.client.stats()).counters["prefix_hit_tokens"] == 32


async def test_a_failing_copy_fails_those_who_wait() -> None:
    async with harness(sources={"a": "one"}) as engine:
        await engine.load("a")
        engine.worker.fail_copy = RuntimeError("no such memory")
        with pytest.raises(EngineError, match="no such memory") as failed:
            await engine.ask("a")
        assert failed.value.code is ErrorCode.ADAPTER_UNAVAILABLE
        engine.worker.fail_copy = None
        assert (await engine.ask("a")).finish is FinishReason.LENGTH


# Unloads


async def test_unload_lets_accepted_requests_end() -> None:
    async with harness(sources={"a": "one"}) as engine:
        await engine.load("a")
        engine.worker.go.clear()
        adapter_id = engine.client.adapters["a"].adapter_id
        asked = [asyncio.create_task(engine.ask("a", max_tokens=9)) for _ in range(9)]  # one more than rows
        await engine.until(lambda: len(engine.worker.plans) >= 2)
        unloading = asyncio.create_task(engine.client.unload_adapter("a"))
        await engine.told()
        assert engine.client.adapters["a"].state is AdapterState.DRAINING
        with pytest.raises(EngineError, match="being unloaded"):
            async with engine.client.generate(prompt=[1], params=params(), adapter_id=adapter_id) as generation:
                await anext(generation)
        with pytest.raises(EngineError, match="being unloaded already"):
            await engine.client.unload_adapter("a")
        with pytest.raises(EngineError, match="being unloaded"):
            await engine.load("a")
        engine.worker.go.set()
        assert {len((await one).tokens) for one in asked} == {9}
        await unloading
        await freed(engine, "a")
        assert await engine.load("a") != adapter_id


async def test_unload_aborts_what_outlives_its_time() -> None:
    async with harness(sources={"a": "one"}) as engine:
        await engine.load("a", pinned=True)
        engine.worker.go.clear()
        asked = asyncio.create_task(engine.ask("a", max_tokens=CONTEXT - 5))
        other = asyncio.create_task(engine.ask(max_tokens=50))
        await engine.until(lambda: any(step.slot >= 0 for plan in engine.worker.plans for step in plan.sequences))
        unloading = asyncio.create_task(engine.client.unload_adapter("a", timeout=0.01))
        with pytest.raises(EngineError, match="was unloaded") as failed:
            await asked
        assert failed.value.code is ErrorCode.ADAPTER_UNAVAILABLE
        assert not unloading.done(), "steps on their way still refer to its memory"
        assert (await engine.client.stats()).chunks["adapter"] == PAGES
        engine.worker.go.set()
        await unloading
        assert (await other).tokens == [7] * 50
        await freed(engine, "a")


async def test_unload_of_an_idle_adapter_is_immediate() -> None:
    async with harness(sources={"a": "one"}) as engine:
        await engine.load("a", pinned=True)
        await engine.client.unload_adapter("a")
        await freed(engine, "a")
        with pytest.raises(EngineError, match="not loaded"):
            await engine.client.unload_adapter("a")


async def test_unload_while_it_loads() -> None:
    async with harness(sources={"a": "one"}) as engine:
        gate = engine.reader.hold("a")
        loading = asyncio.create_task(engine.load("a", pinned=True))
        await engine.reader.reading.wait()
        unloading = asyncio.create_task(engine.client.unload_adapter("a"))
        await engine.told()
        gate.set()
        await unloading
        (failure,) = await asyncio.gather(loading, return_exceptions=True)
        assert code_of(failure) is ErrorCode.ADAPTER_NOT_FOUND
        await freed(engine, "a")


async def test_unload_does_not_wait_for_a_load_that_nobody_needs() -> None:
    async with harness() as engine:
        gate = engine.reader.hold("gone")
        loading = asyncio.create_task(engine.client.load_adapter("a", "gone"))
        await engine.reader.reading.wait()
        async with asyncio.timeout(10):
            await engine.client.unload_adapter("a")
            (failure,) = await asyncio.gather(loading, return_exceptions=True)
        assert code_of(failure) is ErrorCode.ADAPTER_NOT_FOUND
        assert "was unloaded while it was being loaded" in str(failure)
        gate.set()
        await freed(engine, "a")


# Pins


async def test_a_pinned_load_returns_when_it_is_resident() -> None:
    async with harness(sources={"a": "one"}) as engine:
        engine.worker.copies_go = False
        loading = asyncio.create_task(engine.load("a", pinned=True))
        await engine.until(lambda: bool(engine.worker.held))
        await engine.told()
        assert not loading.done()
        engine.worker.held.pop()()
        await loading
        assert state(engine, "a") is AdapterState.RESIDENT


async def test_a_pin_whose_copy_fails_says_so() -> None:
    async with harness(sources={"a": "one"}) as engine:
        await engine.load("a")
        engine.worker.fail_copy = RuntimeError("no such memory")
        with pytest.raises(EngineError, match="no such memory"):
            await engine.client.pin_adapter("a", True)
        engine.worker.fail_copy = None
        async with asyncio.timeout(10):
            info = await engine.client.pin_adapter("a", True)
        assert info.state is AdapterState.RESIDENT


async def test_pinning_tries_a_failed_adapter_again() -> None:
    async with harness(paths=paths("x", "a", "b"), sources=THREE, max_loaded=2, max_slots=2) as engine:
        del engine.reader.sources["b"]
        with pytest.raises(EngineError):
            await engine.ask("b")
        with pytest.raises(EngineError, match="b is not there"):
            async with asyncio.timeout(10):
                await engine.client.pin_adapter("b", True)
        engine.reader.sources["b"] = "two"
        async with asyncio.timeout(10):
            assert (await engine.client.pin_adapter("b", True)).state is AdapterState.RESIDENT


async def test_unpinning_ends_a_pin_that_waits() -> None:
    async with harness(paths=paths("x", "a", "b"), sources=THREE, max_loaded=2, max_slots=2) as engine:
        gate: threading.Event = engine.reader.hold("b")
        engine.reader.reading.clear()
        pinning = asyncio.create_task(engine.client.pin_adapter("b", True))
        async with asyncio.timeout(10):
            await engine.reader.reading.wait()
        await engine.client.pin_adapter("b", False)
        gate.set()
        async with asyncio.timeout(10):
            (failure,) = await asyncio.gather(pinning, return_exceptions=True)
        assert code_of(failure) is ErrorCode.ADAPTER_UNAVAILABLE
        assert "unpinned" in str(failure)

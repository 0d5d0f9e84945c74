"""Loads in place: a name that is loaded gets new weights, while what was accepted before ends on the old ones."""

import asyncio
import threading

import pytest

from engine.config import LoraPath
from engine.types import AdapterState, EngineError, ErrorCode, FinishReason
from tests.engine.loop_harness import PAGES, Choice, Harness, harness

THREE = {"one": "1", "two": "2", "three": "3"}


def planned(engine: Harness) -> set[int]:
    """adapter_ids of every row so far."""
    rows = [plan.slots[row.slot] for plan in engine.worker.plans for row in plan.sequences if row.slot >= 0]
    return {adapter_id for adapter_id in rows if adapter_id is not None}


async def swap(engine: Harness, source: str, **settings: object) -> int:
    info = await engine.client.load_adapter("a", source, inplace=True, **settings)  # type: ignore[arg-type]
    return info.adapter_id


async def start(engine: Harness, name: str = "a", tokens: int = 30) -> "asyncio.Task[Choice]":
    """A request that is accepted, and planned as far as the held worker allows."""
    before = engine.scheduler.stats().adapters
    accepted = sum(adapter.requests for adapter in before)
    asked = asyncio.create_task(engine.ask(name, max_tokens=tokens))
    await engine.until(lambda: sum(adapter.requests for adapter in engine.scheduler.stats().adapters) > accepted)
    return asked


async def emptied(engine: Harness) -> None:
    """One version of one name is left, on the host and perhaps in the arena."""
    await engine.until(lambda: engine.scheduler.idle and not engine.scheduler.adapters.catalog.retired)
    assert len(list(engine.scheduler.adapters.catalog)) == len(engine.scheduler.adapters.infos()) == 1
    assert set(engine.host.adapters) == {engine.client.adapters["a"].adapter_id}
    assert engine.scheduler.stats().tier_bytes["host"] == PAGES * 256


async def test_accepted_requests_end_on_the_old_weights_and_new_ones_get_the_new() -> None:
    async with harness(sources=THREE, max_running=1) as engine:
        old = (await engine.client.load_adapter("a", "one")).adapter_id
        engine.worker.go.clear()
        running, queued = await start(engine), await start(engine)
        await engine.until(lambda: len(engine.worker.plans) == 2)
        new = await swap(engine, "two")
        assert new != old
        assert engine.client.adapters["a"].adapter_id == new
        assert [info.name for info in engine.scheduler.adapters.infos()] == ["a"], "the name is there once"
        assert set(engine.host.adapters.values()) == {"1", "2"}
        told = next(adapter for adapter in engine.scheduler.stats().adapters if adapter.name == "a")
        assert (told.requests, told.running + told.waiting) == (2, 2), "both versions are counted"
        after = await start(engine)
        engine.worker.go.set()
        assert {len((await asked).tokens) for asked in (running, queued, after)} == {30}
        assert planned(engine) == {old, new}
        await emptied(engine)
        told = next(adapter for adapter in engine.scheduler.stats().adapters if adapter.name == "a")
        assert (told.requests, told.generated_tokens) == (3, 90), "totals go on"
        assert engine.scheduler.stats().evictions["arena/replaced"] == 1


async def test_a_request_on_its_way_gets_what_the_name_means_when_it_comes() -> None:
    async with harness(sources=THREE) as engine:
        old = (await engine.client.load_adapter("a", "one")).adapter_id
        for source in ("two", "three"):
            new = await swap(engine, source)
        engine.client.adapters["a"] = engine.client.adapters["a"].__class__(
            name="a", adapter_id=old, source="one", state=AdapterState.HOST
        )
        assert (await engine.ask("a")).finish is FinishReason.LENGTH
        assert planned(engine) == {new}


async def test_new_weights_never_meet_old_kv() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        for source in ("two", "three"):
            await engine.ask("a", prompt=40)
            await engine.ask("a", prompt=40)
            hits = (await engine.client.stats()).counters["prefix_hit_tokens"]
            await swap(engine, source)
            await engine.ask("a", prompt=40)
            assert (await engine.client.stats()).counters["prefix_hit_tokens"] == hits
        assert hits > 0
        await emptied(engine)


async def test_without_such_a_name_it_is_a_plain_load() -> None:
    async with harness(sources=THREE) as engine:
        info = await engine.client.load_adapter("a", "one", inplace=True, weight=2.0)
        assert (info.state, info.weight, info.pinned) == (AdapterState.HOST, 2.0, False)
        with pytest.raises(EngineError, match="nowhere is not there") as failed:
            await engine.client.load_adapter("b", "nowhere", inplace=True)
        assert failed.value.code is ErrorCode.ADAPTER_INVALID
        assert list(engine.client.adapters) == ["a"]


@pytest.mark.parametrize(
    ("told", "kept"), [({}, (True, 3.0)), ({"pinned": False}, (False, 3.0)), ({"weight": 1.5}, (True, 1.5))]
)
async def test_pin_and_weight_carry_over_unless_told(told: dict[str, object], kept: tuple[bool, float]) -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one", pinned=True, weight=3.0)
        info = await engine.client.load_adapter("a", "two", inplace=True, **told)  # type: ignore[arg-type]
        assert (info.pinned, info.weight) == kept
        assert (info.state is AdapterState.RESIDENT) == kept[0]
        assert engine.scheduler.stats().slots_pinned <= 1
        await emptied(engine)


async def test_all_pins_taken_leaves_room_for_the_one_that_is_replaced() -> None:
    async with harness(sources=THREE, max_slots=2) as engine:
        await engine.client.load_adapter("a", "one", pinned=True)
        assert await swap(engine, "two", pinned=True)
        assert engine.client.adapters["a"].pinned
        await engine.client.load_adapter("b", "one")
        with pytest.raises(EngineError, match="at most 1"):
            await engine.client.load_adapter("b", "three", inplace=True, pinned=True)
        assert engine.host.adapters[engine.client.adapters["b"].adapter_id] == "1", "the old one serves on"


@pytest.mark.parametrize("bad", ["nowhere", "fault"])
async def test_a_failed_read_leaves_the_old_one_untouched(bad: str) -> None:
    async with harness(sources=THREE | {"fault": "fault"}) as engine:
        old = (await engine.client.load_adapter("a", "one", pinned=True)).adapter_id
        with pytest.raises(EngineError, match=r"not there|a fault of ours"):
            await swap(engine, bad)
        info = engine.scheduler.adapters.info("a")
        assert (info.adapter_id, info.state, info.error) == (old, AdapterState.RESIDENT, None)
        assert (await engine.ask("a")).finish is FinishReason.LENGTH
        assert planned(engine) == {old}
        await emptied(engine)


async def test_the_host_needs_room_for_both_only_in_bytes() -> None:
    async with harness(sources=THREE, max_loaded=1, max_slots=1) as engine:
        await engine.client.load_adapter("a", "one")
        engine.worker.go.clear()
        asked = await start(engine)
        await engine.until(lambda: len(engine.worker.plans) == 2)
        await swap(engine, "two")
        engine.worker.go.set()
        await asked
        await emptied(engine)


async def test_a_full_host_refuses_and_the_old_one_serves_on() -> None:
    async with harness(sources=THREE, max_host_pages=2 * PAGES - 1) as engine:
        old = (await engine.client.load_adapter("a", "one")).adapter_id
        engine.worker.go.clear()
        asked = await start(engine)
        await engine.until(lambda: len(engine.worker.plans) == 2)
        with pytest.raises(EngineError, match="no room on the host") as refused:
            await swap(engine, "two")
        assert refused.value.code is ErrorCode.ADAPTER_UNAVAILABLE
        engine.worker.go.set()
        await asked
        assert engine.client.adapters["a"].adapter_id == old
        await emptied(engine)


async def test_the_same_content_is_no_swap() -> None:
    async with harness(sources=THREE | {"copy": "1"}) as engine:
        old = (await engine.client.load_adapter("a", "one")).adapter_id
        info = await engine.client.load_adapter("a", "copy", inplace=True, pinned=True, weight=2.0)
        assert info.adapter_id == old
        assert (info.source, info.pinned, info.weight, info.state) == ("copy", True, 2.0, AdapterState.RESIDENT)
        await emptied(engine)


async def test_those_who_ask_for_the_same_before_it_is_read_share_one_load() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        gate = engine.reader.hold("two")
        engine.reader.reads.clear()
        engine.reader.reading.clear()
        first = asyncio.create_task(swap(engine, "two"))
        await engine.reader.reading.wait()
        later = [asyncio.create_task(swap(engine, "two")) for _ in range(5)]
        await engine.told()
        engine.reader.sources["two"] = "2 again"  # the first may have read what was there before
        gate.set()
        ids = await asyncio.gather(first, *later)
        assert len(set(ids[1:])) == 1
        assert len(engine.reader.reads) == 2, "one for the first, one for all that came after it had begun"
        assert set(engine.host.adapters.values()) == {"2 again"}
        await emptied(engine)


async def test_loads_in_place_of_one_name_keep_their_order() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        gate = engine.reader.hold("two")
        engine.reader.reading.clear()
        slow = asyncio.create_task(swap(engine, "two"))
        await engine.reader.reading.wait()
        last = asyncio.create_task(swap(engine, "three"))
        await engine.told()
        assert engine.reader.reads == ["one", "two"], "the second waits for the first"
        gate.set()
        await slow
        third = await last
        assert engine.client.adapters["a"].adapter_id == third
        assert set(engine.host.adapters.values()) <= {"2", "3"}
        await emptied(engine)
        assert set(engine.host.adapters.values()) == {"3"}


async def test_it_waits_for_a_first_load_of_the_name() -> None:
    async with harness(sources=THREE) as engine:
        gate = engine.reader.hold("one")
        first = asyncio.create_task(engine.client.load_adapter("a", "one"))
        await engine.reader.reading.wait()
        second = asyncio.create_task(swap(engine, "two"))
        await engine.told()
        gate.set()
        assert (await first).adapter_id != await second
        await emptied(engine)
        assert set(engine.host.adapters.values()) == {"2"}


async def test_an_unload_ends_a_load_in_place() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one", pinned=True)
        gate: threading.Event = engine.reader.hold("two")
        engine.reader.reading.clear()
        replacing = asyncio.create_task(swap(engine, "two"))
        await engine.reader.reading.wait()
        async with asyncio.timeout(10):
            await engine.client.unload_adapter("a")
            (failure,) = await asyncio.gather(replacing, return_exceptions=True)
        assert isinstance(failure, EngineError)
        assert failure.code is ErrorCode.ADAPTER_NOT_FOUND
        gate.set()
        assert engine.client.adapters == {}
        assert engine.host.adapters == {}
        stats = await engine.client.stats()
        assert stats.chunks["adapter"] == stats.tier_bytes["host"] == 0


async def test_an_unload_waits_for_the_versions_before() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        engine.worker.go.clear()
        asked = await start(engine)
        await engine.until(lambda: len(engine.worker.plans) == 2)
        await swap(engine, "two")
        unloading = asyncio.create_task(engine.client.unload_adapter("a"))
        await engine.told()
        assert not unloading.done()
        with pytest.raises(EngineError, match="being unloaded"):
            await swap(engine, "three")
        engine.worker.go.set()
        assert (await asked).finish is FinishReason.LENGTH
        await unloading
        assert engine.host.adapters == {}


async def test_a_pin_that_waits_follows_the_name() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        engine.worker.copies_go = False
        pinning = asyncio.create_task(engine.client.pin_adapter("a", True))
        await engine.until(lambda: bool(engine.worker.held))
        replacing = asyncio.create_task(swap(engine, "two"))
        await engine.until(lambda: len(engine.worker.held) == 2)
        engine.worker.copies_go = True
        for copy in engine.worker.held:
            copy()
        async with asyncio.timeout(10):
            assert (await pinning).adapter_id == await replacing
        await emptied(engine)


async def test_a_cold_or_failed_adapter_is_replaced() -> None:
    listed = [LoraPath(name=name, path=name) for name in ("one", "a")]
    async with harness(paths=listed, sources=THREE | {"a": "0"}, max_loaded=1, max_slots=1) as engine:
        assert engine.scheduler.adapters.info("a").state is AdapterState.COLD
        del engine.reader.sources["a"]
        with pytest.raises(EngineError, match="not there"):
            await engine.ask("a")
        info = await engine.client.load_adapter("a", "two", inplace=True)
        assert info.state is AdapterState.HOST
        assert (await engine.ask("a")).finish is FinishReason.LENGTH


# Time-outs and force


@pytest.mark.parametrize("inplace", [False, True])
async def test_a_load_that_takes_too_long_is_given_up(inplace: bool) -> None:
    async with harness(sources=THREE) as engine:
        if inplace:
            await engine.client.load_adapter("a", "one")
        gate = engine.reader.hold("two")
        async with asyncio.timeout(10):
            with pytest.raises(EngineError, match="not loaded within the given time") as late:
                await engine.client.load_adapter("a", "two", inplace=inplace, timeout=0.01)
        assert late.value.code is ErrorCode.ADAPTER_UNAVAILABLE
        assert [info.source for info in engine.scheduler.adapters.infos()] == (["one"] if inplace else [])
        gate.set()
        assert (await engine.client.load_adapter("a", "two", inplace=inplace)).source == "two"
        assert (await engine.ask("a")).finish is FinishReason.LENGTH


async def test_who_joins_a_load_has_a_time_of_its_own() -> None:
    async with harness(sources=THREE) as engine:
        gate = engine.reader.hold("two")
        patient = asyncio.create_task(engine.client.load_adapter("a", "two"))
        await engine.reader.reading.wait()
        with pytest.raises(EngineError, match="within the given time"):
            await engine.client.load_adapter("a", "two", timeout=0.01)
        assert not patient.done()
        gate.set()
        assert (await patient).state is AdapterState.HOST
        assert engine.reader.reads == ["two"]


async def test_a_pinned_load_that_finds_no_room_in_time_is_not_pinned() -> None:
    async with harness(sources=THREE) as engine:
        engine.worker.copies_go = False
        with pytest.raises(EngineError, match="is not pinned"):
            await engine.client.load_adapter("a", "one", pinned=True, timeout=0.05)
        await engine.told()
        assert not engine.client.adapters["a"].pinned
        for copy in engine.worker.held:
            copy()


async def test_a_pin_whose_copy_fails_is_no_pin() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        engine.worker.fail_copy = RuntimeError("no such memory")
        with pytest.raises(EngineError, match="no such memory"):
            await engine.client.pin_adapter("a", True)
        await engine.told()
        assert not engine.client.adapters["a"].pinned
        assert not engine.scheduler.adapters.info("a").pinned


async def test_force_ends_what_uses_it_at_once_and_hurries_an_unload_that_waits() -> None:
    async with harness(sources=THREE) as engine:
        await engine.client.load_adapter("a", "one")
        engine.worker.go.clear()
        asked = [await start(engine) for _ in range(12)]
        await engine.until(lambda: len(engine.worker.plans) == 2)
        waiting = asyncio.create_task(engine.client.unload_adapter("a", timeout=3600))
        await engine.told()
        forced = asyncio.create_task(engine.client.unload_adapter("a", force=True))
        for failure in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failure, EngineError)
            assert failure.code is ErrorCode.ADAPTER_UNAVAILABLE
            assert failure.message == "adapter 'a' was unloaded"
        engine.worker.go.set()
        async with asyncio.timeout(10):
            await forced
            assert engine.host.adapters == {}, "it is gone when force is answered"
            await waiting
        await engine.client.load_adapter("a", "one")
        await engine.client.unload_adapter("a", force=True)
        assert engine.client.adapters == {}


async def test_a_failed_source_is_told_without_the_servers_path() -> None:
    listed = [LoraPath(name="a", path="/srv/a"), LoraPath(name="b", path="/srv/b")]
    async with harness(paths=listed, sources={"/srv/a": "1", "/srv/b": "2"}, max_loaded=1, max_slots=1) as engine:
        del engine.reader.sources["/srv/b"]
        for _ in range(2):
            with pytest.raises(EngineError, match="its source is not there") as failed:
                await engine.ask("b")
            assert "/srv" not in failed.value.message
        await engine.told()
        assert engine.client.adapters["b"].error == "its source is not there"


@pytest.mark.parametrize("how", ["load", "inplace", "unload"])
async def test_a_load_or_an_unload_forgets_a_failure(how: str) -> None:
    listed = [LoraPath(name="x", path="one"), LoraPath(name="a", path="two")]
    async with harness(paths=listed, sources=THREE.copy(), max_loaded=2, max_slots=1) as engine:
        await engine.client.load_adapter("y", "three")
        await engine.client.load_adapter("z", "three")  # takes the place of one on the host
        away = next(name for name in ("x", "a") if not engine.scheduler.adapters.catalog.named(name).on_host)
        source = engine.client.adapters[away].source
        content = engine.reader.sources.pop(source)
        with pytest.raises(EngineError, match="not there"):
            await engine.ask(away)
        engine.reader.sources[source] = content
        if how == "unload":
            await engine.client.unload_adapter(away)
        await engine.client.load_adapter(away, source, inplace=how == "inplace")
        assert (await engine.ask(away)).finish is FinishReason.LENGTH

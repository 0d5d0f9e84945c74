"""Places of adapters: who is evicted, who may be pinned, who leaves the host."""

import pytest

from engine.adapters.adapter import Adapter, Hosted
from engine.adapters.residency import HostFullError, Limits, Residency
from engine.arena import Arena
from engine.slots import Slots
from engine.types import EngineError, ErrorCode


class Bench:
    """A residency with adapters on the host."""

    def __init__(self, **limits: int | None) -> None:
        values = {"max_pins": 1, "max_loaded": None, "max_host_pages": None, "max_adapter_chunks": 4}
        self.arena = Arena(20)
        self.slots = Slots(2)
        made = Limits(**{**values, "context_blocks": 10, **limits})  # type: ignore[arg-type]
        self.residency = Residency(self.arena, self.slots, made)
        self.adapters: list[Adapter] = []

    def host(self, pages: int = 2) -> Adapter:
        adapter = Adapter(len(self.adapters) + 1, f"a{len(self.adapters)}", "x", None, False, 0.0)
        self.adapters.append(adapter)
        self.residency.make_host_room(adapter, pages, ())
        self.residency.hosted(adapter, Hosted(pages, 8, (), "c"))
        return adapter

    def resident(self, pages: int = 2) -> Adapter:
        adapter = self.host(pages)
        self.residency.place(adapter)
        self.residency.placed(adapter)
        self.check()
        return adapter

    def run(self, adapter: Adapter, last_step: int = 0) -> None:
        """A sequence of it runs and ends."""
        self.residency.acquire(adapter)
        self.residency.release(adapter, last_step, 0)

    def check(self) -> None:
        self.arena.check()
        self.residency.check(self.adapters)


def test_a_load_takes_a_chunk_a_page_and_is_ready_when_told() -> None:
    bench = Bench()
    adapter = bench.host(3)
    load = bench.residency.place(adapter)
    assert load.chunks == tuple(adapter.chunks)
    assert len(load.chunks) == 3
    assert not adapter.ready
    assert bench.residency.next_victim(()) is None
    bench.residency.placed(adapter)
    assert adapter.ready
    assert bench.residency.next_victim(()) is adapter
    bench.check()


def test_the_least_recently_used_is_evicted_first() -> None:
    bench = Bench()
    one, two, three = (bench.resident() for _ in range(3))
    bench.run(one)
    assert bench.residency.next_victim(()) is two
    assert bench.residency.next_victim((two.adapter_id,)) is three
    bench.residency.evict(two, "memory")
    assert bench.residency.next_victim(()) is three
    assert bench.residency.take_evicted() == [two.adapter_id]
    assert bench.residency.take_evicted() == []
    assert bench.residency.evictions == {"arena/memory": 1}
    bench.check()


def test_running_pinned_and_in_flight_adapters_stay() -> None:
    bench = Bench()
    running, pinned, flying = (bench.resident() for _ in range(3))
    bench.residency.acquire(running)
    running.tally.running = 1
    pinned.pinned = True
    bench.arena.planned = 1
    bench.run(flying, last_step=1)
    assert bench.residency.next_victim(()) is None
    assert bench.residency.idle_chunks(()) == 0
    bench.arena.commit(1)
    assert bench.residency.next_victim(()) is flying
    bench.check()


def test_eviction_empties_the_slot_and_frees_behind_the_last_step() -> None:
    bench = Bench()
    adapter = bench.resident()
    bench.arena.planned = 1
    bench.run(adapter, last_step=1)
    assert adapter.adapter_id in bench.slots.table
    bench.residency.evict(adapter, "unload")
    assert adapter.adapter_id not in bench.slots.table
    assert bench.arena.coming == 2
    bench.arena.commit(1)
    assert bench.arena.free == 20
    bench.check()


def test_the_host_makes_room_by_count_and_by_pages() -> None:
    by_count = Bench(max_loaded=2)
    one, two = by_count.host(), by_count.resident()
    assert by_count.residency.make_host_room(Adapter(9, "n", "", None, False, 0.0), 2, ()) == [one]
    assert not one.on_host
    by_pages = Bench(max_host_pages=5)
    one, two = by_pages.host(2), by_pages.resident(2)
    assert by_pages.residency.make_host_room(Adapter(9, "n", "", None, False, 0.0), 4, ()) == [one, two]
    assert not two.chunks
    assert by_pages.residency.evictions == {"host/capacity": 2, "arena/host": 1}
    assert by_pages.residency.host_pages == 4


def test_who_is_in_use_stays_on_the_host() -> None:
    bench = Bench(max_loaded=3)
    pinned, started, copying = bench.host(), bench.host(), bench.host()
    pinned.pinned, started.started = True, 1
    bench.residency.place(copying)
    newcomer = Adapter(9, "n", "", None, False, 0.0)
    with pytest.raises(HostFullError, match="'n'"):
        bench.residency.make_host_room(newcomer, 1, ())
    assert not bench.residency.may_fetch(newcomer, 0, ())
    started.started = 0
    assert not bench.residency.may_fetch(newcomer, 0, (started.adapter_id,))
    assert bench.residency.may_fetch(newcomer, 0, ())
    assert not bench.residency.may_fetch(newcomer, 1, ())
    assert bench.residency.make_host_room(newcomer, 1, ()) == [started]


def test_a_full_host_is_left_as_it_was() -> None:
    bench = Bench(max_host_pages=6)
    bench.host(2).started = 1
    bench.host(2)
    with pytest.raises(HostFullError):
        bench.residency.make_host_room(Adapter(9, "n", "", None, False, 0.0), 4, (2,))
    assert [adapter.on_host for adapter in bench.adapters] == [True, True]
    bench.check()


@pytest.mark.parametrize(("limits", "match"), [({"max_host_pages": 3}, "host tier has 3"), ({}, "largest allowed 4")])
def test_what_never_fits_is_invalid(limits: dict[str, int], match: str) -> None:
    bench = Bench(**limits)
    pages = 4 if limits else 5
    with pytest.raises(EngineError, match=match, check=lambda error: error.code is ErrorCode.ADAPTER_INVALID):
        bench.residency.make_host_room(Adapter(9, "n", "", None, False, 0.0), pages, ())


def test_pins_are_bounded_by_number() -> None:
    bench = Bench(max_pins=1)
    one, two = bench.host(), bench.host()
    bench.residency.check_pin(one, bench.adapters)
    one.pinned = True
    bench.residency.check_pin(one, bench.adapters)
    with pytest.raises(EngineError, match="at most 1", check=lambda error: error.code is ErrorCode.INVALID_REQUEST):
        bench.residency.check_pin(two, bench.adapters)


def test_pins_leave_room_for_the_largest_adapter_and_one_context() -> None:
    bench = Bench(max_pins=9)  # 20 chunks, 4 for the largest adapter, 10 for a context: 6 are left
    adapters = [bench.host(3) for _ in range(3)]
    for adapter in adapters[:2]:
        bench.residency.check_pin(adapter, bench.adapters)
        adapter.pinned = True
    with pytest.raises(EngineError, match="more than the 20"):
        bench.residency.check_pin(adapters[2], bench.adapters)


def test_pins_leave_room_on_the_host_too() -> None:
    bench = Bench(max_pins=9, max_host_pages=8)
    bench.residency.check_pin(bench.host(4), bench.adapters)
    bench.adapters[0].pinned = True
    with pytest.raises(EngineError, match="more than the host's 8"):
        bench.residency.check_pin(bench.host(1), bench.adapters)


def test_an_unread_adapter_counts_as_the_largest_for_a_pin() -> None:
    bench = Bench(max_pins=9)
    known = bench.host(3)
    known.pinned = True
    with pytest.raises(EngineError, match="7 chunks of pinned adapters"):
        bench.residency.check_pin(Adapter(9, "n", "", None, False, 0.0), bench.adapters)

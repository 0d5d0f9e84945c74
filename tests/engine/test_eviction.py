"""What leaves a full arena first, least recently used and weighed."""

import pytest

from engine.adapters.adapter import Adapter
from engine.arena import Arena
from engine.eviction import Costs, EvictionClock, estimated_costs
from tests.engine.simulated import Driver, small_config


def idle(adapter_id: int, since: float, pages: int) -> Adapter:
    name = str(adapter_id)
    return Adapter(adapter_id, name, name, None, pinned=False, created=0.0, pages=pages, idle_since=since)


def test_without_costs_only_the_last_use_counts() -> None:
    arena = Arena(4)
    clock = EvictionClock(arena)
    arena.planned = 7
    clock.evicted(100.0)
    assert clock.now == 7
    small, large = idle(1, 3.0, 1), idle(2, 5.0, 30)
    assert clock.first([small, large]) is small
    assert clock.block(4.0) < clock.adapter(large)
    assert clock.block(4.0) > clock.adapter(small)


def test_what_is_dear_to_bring_back_stays_longer_but_not_for_ever() -> None:
    clock = EvictionClock(Arena(4), Costs(block=2.0, chunk=1.0, load=6.0))
    small, large = idle(1, 0.0, 2), idle(2, 0.0, 30)
    assert clock.first([small, large]) is large
    assert clock.adapter(large) < clock.block(0.0) < clock.adapter(small)
    for _ in range(3):  # the clock moves on with each block that goes
        clock.evicted(clock.block(clock.now))
    assert clock.now == 6.0
    assert clock.adapter(small) < clock.block(clock.now)
    assert clock.first([]) is None


def test_an_estimate_weighs_a_small_adapters_load_heavily() -> None:
    for on_gpu in (True, False):
        costs = estimated_costs(16, 2 << 20, on_gpu=on_gpu)
        assert costs.load > costs.block > costs.chunk > 0


@pytest.mark.parametrize(("costs", "evicted"), [(None, True), (Costs(block=1.0, chunk=9.0, load=0.0), False)])
def test_the_scheduler_weighs_adapters_against_blocks(costs: Costs | None, evicted: bool) -> None:
    driver = Driver(small_config(num_chunks=16, costs=costs))
    driver.add("a", 4)
    driver.submit([1] * 8, "a", max_tokens=2)
    driver.run()
    for start in range(2, 8):  # blocks of the base fill the rest, more recent than the adapter
        driver.submit([start] * 12, max_tokens=2, ignore_eos=True)
        driver.run()
    assert bool(driver.scheduler.stats().evictions.get("arena/memory")) is evicted
    assert driver.scheduler.stats().evictions["prefix/memory"] > 0
    driver.check_outputs()


# Prefetch


@pytest.mark.parametrize("prefetch", [True, False])
def test_without_prefetch_an_adapter_is_copied_when_a_slot_is_free_for_it(prefetch: bool) -> None:
    driver = Driver(small_config(max_slots=1, prefetch=prefetch))
    for name in ("a", "b"):
        driver.add(name)
    first = driver.submit([1], "a", max_tokens=12, ignore_eos=True)
    driver.run_until(lambda: bool(driver.requests[first].tokens[0]))
    driver.submit([1], "b", max_tokens=2)
    driver.run_until(lambda: len(driver.requests[first].tokens[0]) > 6)
    assert (driver.scheduler.stats().resident == 2) is prefetch
    driver.run()
    driver.check_outputs()
    assert driver.counter("prefetch_hits") == prefetch


def test_prefetch_never_evicts_what_is_wanted_earlier() -> None:
    driver = Driver(small_config(num_chunks=14, max_slots=2, max_running=1, prefix_cache=False, max_model_len=36))
    for name in ("a", "b", "c"):
        driver.add(name, 4)
    driver.submit([1] * 16, max_tokens=8, ignore_eos=True)  # 6 of 14 chunks, and the only row
    driver.step()
    for name in ("a", "b", "c"):
        driver.submit([1], name, max_tokens=2)
    driver.run_until(lambda: driver.scheduler.stats().resident == 2)
    for _ in range(3):
        driver.step()
    resident = {name: driver.scheduler.adapters.info(name).state.value for name in ("a", "b", "c")}
    assert resident == {"a": "resident", "b": "resident", "c": "host"}
    driver.run()
    driver.check_outputs()


def test_without_prefetch_waiting_for_a_slot_is_bounded_too() -> None:
    driver = Driver(small_config(max_slots=1, patience=5, prefetch=False))
    for name in ("hot", "cold"):
        driver.add(name)
    for _ in range(3):
        driver.submit([1], "hot", max_tokens=6, ignore_eos=True)
        driver.step()
    waiting = driver.submit([1], "cold", max_tokens=2)
    for _ in range(40):
        if driver.scheduler.stats().waiting < 3:
            driver.submit([1], "hot", max_tokens=6, ignore_eos=True)
        driver.step()
    assert driver.requests[waiting].finish
    driver.run()
    driver.check_outputs()

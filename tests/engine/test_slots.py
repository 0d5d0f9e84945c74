"""Slots: held by running sequences, left to the least recently held."""

import random

import pytest

from engine.slots import Slots


def test_a_held_slot_is_never_taken() -> None:
    slots = Slots(2)
    assert slots.acquire(1) != slots.acquire(2)
    assert not slots.available(3)
    with pytest.raises(LookupError):
        slots.acquire(3)
    slots.release(1)
    assert slots.available(3)
    assert slots.acquire(3) == 0
    assert slots.table == (3, 2)


def test_an_adapter_keeps_its_slot_until_another_needs_it() -> None:
    slots = Slots(2)
    slot = slots.acquire(1)
    slots.release(1)
    slots.acquire(2)
    assert slots.acquire(1) == slot


def test_the_least_recently_held_goes_first() -> None:
    slots = Slots(3)
    for adapter in (1, 2, 3):
        slots.acquire(adapter)
    for adapter in (2, 3, 1):
        slots.release(adapter)
    slots.acquire(4)
    assert slots.table == (1, 4, 3)


def test_an_empty_slot_is_taken_before_one_that_still_has_an_adapter() -> None:
    slots = Slots(2)
    slots.acquire(1)
    slots.release(1)
    slots.acquire(2)
    assert set(slots.table) == {1, 2}


def test_clear_empties_the_slot() -> None:
    slots = Slots(1)
    slots.acquire(1)
    slots.release(1)
    slots.clear(1)
    slots.clear(99)
    assert slots.table == (None,)
    assert slots.used == 0


@pytest.mark.parametrize("seed", range(10))
def test_random_histories(seed: int) -> None:
    rng = random.Random(seed)
    slots = Slots(3)
    running: dict[int, int] = {}
    for _ in range(500):
        adapter = rng.randint(1, 6)
        if rng.random() < 0.5:
            held = {a for a, count in running.items() if count}
            assert slots.available(adapter) == (adapter in held or len(held) < 3)
            if slots.available(adapter):
                slot = slots.acquire(adapter)
                assert slots.table[slot] == adapter
                running[adapter] = running.get(adapter, 0) + 1
        elif running.get(adapter):
            slots.release(adapter)
            running[adapter] -= 1
        elif rng.random() < 0.2:
            slots.clear(adapter)
        slots.check({a: count for a, count in running.items() if count})

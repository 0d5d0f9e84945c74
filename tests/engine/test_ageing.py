"""The bounds of docs/architecture.md, in steps; with the rule off the same traffic starves."""

import random

import pytest

from engine.draft import MAX_AHEAD
from tests.engine.simulated import Driver, small_config

SLOTS = 8
PATIENCE = 16
LONGEST = 12  # steps that a hot sequence runs
PATIENT = 200  # steps after which a wait counts as starvation


def saturated(seed: int, patience: int | None, colds: int = 1) -> tuple[Driver, random.Random]:
    """Eight hot adapters that hold all slots, with several sequences each, and cold ones on the host."""
    driver = Driver(
        small_config(
            num_chunks=250, max_running=64, prefill_tokens=128, max_slots=SLOTS, max_adapter_chunks=4,
            patience=patience, prefix_cache=False,
        )
    )  # fmt: skip
    for index in range(SLOTS):
        driver.add(f"hot{index}")
    for index in range(colds):
        driver.add(f"cold{index}")
    rng = random.Random(seed)
    feed(driver, rng)
    driver.run_until(lambda: driver.scheduler.stats().slots_used == SLOTS)
    return driver, rng


def feed(driver: Driver, rng: random.Random) -> None:
    """Every hot adapter has five sequences open, so its slot never falls empty by itself."""
    for index in range(SLOTS):
        adapter = driver.scheduler.adapters.catalog.named(f"hot{index}")
        while adapter.tally.waiting + adapter.tally.running < 5:
            driver.submit([rng.randrange(1, 50)], adapter.name, max_tokens=rng.randint(4, LONGEST), ignore_eos=True)


def wait_of(driver: Driver, rng: random.Random, requests: list[int], limit: int) -> list[int]:
    """Steps until each of these is first planned."""
    first = driver.scheduler.stats().step
    due = {driver.scheduler._roster.requests[request].choices[0].sequence_id: request for request in requests}
    waits: dict[int, int] = {}
    for _ in range(limit):
        feed(driver, rng)
        driver.step()
        waits.update(
            (due[a.sequence_id], driver.plans[-1].step - first)
            for a in driver.plans[-1].admissions
            if a.sequence_id in due and due[a.sequence_id] not in waits
        )
        if len(waits) == len(due):
            break
    return [waits.get(request, limit) for request in requests]


@pytest.mark.parametrize("seed", range(20))
def test_a_cold_adapter_gets_a_slot_within_its_bound(seed: int) -> None:
    driver, rng = saturated(seed, PATIENCE)
    (wait,) = wait_of(driver, rng, [driver.submit([1], "cold0", max_tokens=2)], PATIENT)
    assert PATIENCE <= wait <= PATIENCE + LONGEST + 2 * MAX_AHEAD + 2
    assert driver.counter("slot_reservations") == 1
    assert driver.counter("skips_slot_drains") > 0


@pytest.mark.parametrize("seed", range(5))
def test_cold_adapters_follow_one_another(seed: int) -> None:
    driver, rng = saturated(seed, PATIENCE, colds=4)
    requests = [driver.submit([1], f"cold{index}", max_tokens=2) for index in range(4)]
    waits = wait_of(driver, rng, requests, PATIENT)
    for before, wait in enumerate(waits):
        assert wait <= PATIENCE + (before + 1) * (LONGEST + 2 * MAX_AHEAD + 2)


@pytest.mark.parametrize("seed", range(3))
def test_without_the_rule_a_cold_adapter_starves(seed: int) -> None:
    driver, rng = saturated(seed, None)
    assert wait_of(driver, rng, [driver.submit([1], "cold0", max_tokens=2)], PATIENT) == [PATIENT]
    assert driver.counter("slot_reservations") == 0
    assert driver.counter("skips_no_slot") >= PATIENT - 10


# Memory for a load


LARGEST = 48  # chunks of an adapter of rank 256


def full_of_kv(seed: int, patience: int | None, longest: int = 40) -> tuple[Driver, random.Random]:
    """Running sequences hold nearly every chunk and go on growing; as many again wait."""
    driver = Driver(
        small_config(
            num_chunks=140, max_model_len=160, max_running=24, prefill_tokens=64, max_slots=SLOTS,
            max_adapter_chunks=LARGEST, patience=patience, prefix_cache=bool(seed % 2),
        )
    )  # fmt: skip
    driver.add("largest", LARGEST)
    rng = random.Random(seed)
    for _ in range(30):
        fill(driver, rng, longest)
        driver.step()
    return driver, rng


def fill(driver: Driver, rng: random.Random, longest: int = 40) -> None:
    while driver.scheduler.stats().waiting < 6:
        prompt = [rng.randrange(1, 50) for _ in range(rng.randint(8, 20))]
        driver.submit(prompt, max_tokens=rng.randint(longest // 2, longest), ignore_eos=True)


def steps_until_loaded(driver: Driver, rng: random.Random, limit: int) -> int:
    first = driver.scheduler.stats().step
    for _ in range(limit):
        fill(driver, rng)
        driver.step()
        if any(plan.loads for plan in driver.plans[-1:]):
            return driver.plans[-1].step - first
    return limit


@pytest.mark.parametrize("seed", range(20))
def test_a_load_gets_into_an_arena_full_of_kv_within_its_bound(seed: int) -> None:
    driver, rng = full_of_kv(seed, patience=6)
    request = driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert steps_until_loaded(driver, rng, 300) <= 2 * 6 + 2 * MAX_AHEAD
    assert driver.counter("load_reservations") == 1
    evictions = driver.scheduler.stats().evictions.get("arena/memory", 0)
    driver.run_until(lambda: driver.scheduler._roster.requests[request].started, 300)
    assert driver.scheduler.stats().evictions.get("arena/memory", 0) == evictions, "it went before it was used"
    driver.run()
    driver.check_outputs()


def test_running_sequences_make_way_for_a_load_and_come_back() -> None:
    driver, rng = full_of_kv(0, patience=6, longest=130)
    driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert 2 * 6 <= steps_until_loaded(driver, rng, 300) <= 2 * 6 + 2 * MAX_AHEAD
    assert driver.counter("load_preemptions") > 0
    driver.run()
    driver.check_outputs()


def test_a_pinned_load_is_bounded_too() -> None:
    driver, rng = full_of_kv(1, patience=6)
    driver.scheduler.adapters.pin("largest")
    assert steps_until_loaded(driver, rng, 300) <= 2 * 6 + 2 * MAX_AHEAD


def test_without_the_rule_a_load_starves() -> None:
    driver, rng = full_of_kv(0, patience=None)
    driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert steps_until_loaded(driver, rng, 300) == 300
    assert driver.counter("load_preemptions") == 0


def test_a_load_waits_for_copies_that_hold_the_memory() -> None:
    driver = Driver(small_config(num_chunks=14, max_slots=6, patience=1), late_loads=True)
    for name in "abcdef":
        driver.add(name, 4 if name in "abcd" else 1)
        driver.submit([1, 2], name, max_tokens=2)
        if name >= "d":  # a plan of loads alone for each of the last two
            driver.step()
    driver.plan()
    assert len(driver.copying) == 5
    assert driver.scheduler.stats().running == 0
    driver.late_loads = False
    driver.run()
    driver.check_outputs()


@pytest.mark.parametrize("seed", range(6))
def test_a_due_load_does_not_stop_an_engine_in_which_nothing_runs(seed: int) -> None:
    """Adapters of which few fit at once beside little KV: whoever was loaded for its turn also gets it."""
    driver = Driver(
        small_config(
            num_chunks=38, block_tokens=16, max_model_len=160, max_running=24, prefill_tokens=64, max_slots=SLOTS,
            max_adapter_chunks=27, patience=8 + seed, prefix_cache=False,
        )
    )  # fmt: skip
    rng = random.Random(seed)
    names = [None, "one", "two", "seven", "large", "other"]
    for name, pages in zip(names[1:], (1, 2, 7, 27, 7), strict=True):
        driver.add(str(name), pages)
    for index in range(48):
        prompt = [rng.randrange(1, 50) for _ in range(rng.randint(1, 60))]
        driver.submit(prompt, names[index % len(names)], max_tokens=rng.choice((6, 60)), ignore_eos=True)
    driver.run()
    driver.check_outputs()
    assert driver.counter("load_reservations") > 0

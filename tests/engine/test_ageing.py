"""The bounds of docs/architecture.md, in steps; with the rule off the same traffic starves."""

import itertools
import random
from dataclasses import dataclass

import pytest

from tests.engine.simulated import Driver, small_config

SLOTS = 8
PATIENCE = 16
LONGEST = 12  # tokens that a hot sequence generates at most
PROMPT_STEP = 32  # prompt tokens that a step computes at least: a quarter of --chunked-prefill-size
FOR_EVER = 160  # steps; several times the bound
OPEN = 7  # sequences of each hot adapter

SEEDS = [seed if seed < 8 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(20)]
CASES = [
    *(pytest.param(seed, "fcfs", marks=() if seed < 8 else pytest.mark.slow) for seed in range(20)),
    *((seed, "fair") for seed in range(4)),
]


def slot_bound(before: int, prompts: int, patience: int = PATIENCE) -> int:
    """Steps that a sequence waits for a slot at most: the formula of docs/architecture.md.

    `before`: adapters without a slot that go before it; `prompts`: tokens of running prompts not computed yet.
    """
    return patience + (before + 1) * (LONGEST + -(-prompts // PROMPT_STEP)) + 6


def load_bound(patience: int) -> int:
    """Steps that a load waits for memory at most."""
    return 2 * patience + 4


def saturated(
    seed: int, patience: int | None, colds: int = 1, policy: str = "fcfs", longest_prompt: int = 1
) -> tuple[Driver, random.Random]:
    """Eight hot adapters that hold all slots, with several sequences each, and cold ones on the host."""
    driver = Driver(
        small_config(
            num_chunks=600, max_running=64, prefill_tokens=4 * PROMPT_STEP, max_slots=SLOTS, max_adapter_chunks=4,
            patience=patience, prefix_cache=False, policy=policy,
        )
    )  # fmt: skip
    for index in range(SLOTS):
        driver.add(f"hot{index}")
    for index in range(colds):
        driver.add(f"cold{index}")
    seldom(driver)
    rng = random.Random(seed)
    feed(driver, rng, longest_prompt)
    driver.run_until(lambda: driver.scheduler.stats().slots_used == SLOTS)
    return driver, rng


def seldom(driver: Driver, times: int = 16) -> None:
    """Checks every so many operations only: with dozens of sequences that is what takes the time."""
    whole, turns = driver.check, itertools.count()

    def check() -> None:
        if next(turns) % times == 0:
            whole()

    driver.check = check  # type: ignore[method-assign]


def feed(driver: Driver, rng: random.Random, longest_prompt: int = 1) -> None:
    """Every hot adapter has so many sequences open that its slot never falls empty by itself."""
    for index in range(SLOTS):
        adapter = driver.scheduler.adapters.catalog.named(f"hot{index}")
        while adapter.tally.waiting + adapter.tally.running < OPEN:
            prompt = [rng.randrange(1, 50) for _ in range(rng.randint(1, longest_prompt))]
            driver.submit(prompt, adapter.name, max_tokens=rng.randint(4, LONGEST), ignore_eos=True)


@dataclass
class Waits:
    """Steps until each request was first planned, and the most prompt tokens that running sequences had to compute."""

    steps: list[int]
    prompts: int = 0


def wait_of(
    driver: Driver, rng: random.Random, requests: list[int], limit: int = FOR_EVER, longest_prompt: int = 1
) -> Waits:
    """Goes on with the hot traffic until all of these run, or to the limit."""
    first = driver.scheduler.stats().step
    due = {driver.scheduler._roster.requests[request].choices[0].sequence_id: request for request in requests}
    waits: dict[int, int] = {}
    told = Waits([])
    for _ in range(limit):
        feed(driver, rng, longest_prompt)
        driver.step()
        running = driver.scheduler._roster.running.values()
        told.prompts = max(told.prompts, sum(max(s.prompt_length - s.planned, 0) for s in running))
        waits.update(
            (due[a.sequence_id], driver.plans[-1].step - first)
            for a in driver.plans[-1].admissions
            if a.sequence_id in due and due[a.sequence_id] not in waits
        )
        if len(waits) == len(due):
            break
    told.steps = [waits.get(request, limit) for request in requests]
    return told


@pytest.mark.parametrize(("seed", "policy"), CASES)
def test_a_cold_adapter_gets_a_slot_within_its_bound(seed: int, policy: str) -> None:
    driver, rng = saturated(seed, PATIENCE, policy=policy)
    waits = wait_of(driver, rng, [driver.submit([1], "cold0", max_tokens=2)])
    assert PATIENCE <= waits.steps[0] <= slot_bound(before=0, prompts=waits.prompts)
    assert driver.counter("slot_reservations") == 1
    assert driver.counter("skips_slot_drains") > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_under_way_are_part_of_the_bound(seed: int) -> None:
    driver, rng = saturated(seed, PATIENCE, longest_prompt=24)
    waits = wait_of(driver, rng, [driver.submit([1], "cold0", max_tokens=2)], longest_prompt=24)
    assert PATIENCE <= waits.steps[0] <= slot_bound(before=0, prompts=waits.prompts)
    assert driver.counter("prompt_chunks") > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_cold_adapters_follow_one_another(seed: int) -> None:
    driver, rng = saturated(seed, PATIENCE, colds=4)
    requests = [driver.submit([1], f"cold{index}", max_tokens=2) for index in range(4)]
    waits = wait_of(driver, rng, requests)
    for before, wait in enumerate(waits.steps):
        assert wait <= slot_bound(before, waits.prompts)


@pytest.mark.parametrize(("seed", "policy"), CASES)
def test_without_the_rule_a_cold_adapter_starves(seed: int, policy: str) -> None:
    driver, rng = saturated(seed, None, policy=policy)
    assert wait_of(driver, rng, [driver.submit([1], "cold0", max_tokens=2)]).steps == [FOR_EVER]
    assert driver.counter("slot_reservations") == 0
    assert driver.counter("skips_no_slot") >= FOR_EVER - 10


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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_load_gets_into_an_arena_full_of_kv_within_its_bound(seed: int) -> None:
    driver, rng = full_of_kv(seed, patience=6)
    request = driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert steps_until_loaded(driver, rng, 300) <= load_bound(6)
    assert driver.counter("load_reservations") == 1
    evictions = driver.scheduler.stats().evictions.get("arena/memory", 0)
    driver.run_until(lambda: driver.scheduler._roster.requests[request].started, 300)
    assert driver.scheduler.stats().evictions.get("arena/memory", 0) == evictions, "it went before it was used"
    driver.run()
    driver.check_outputs()


def test_running_sequences_make_way_for_a_load_and_come_back() -> None:
    driver, rng = full_of_kv(0, patience=6, longest=130)
    driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert 2 * 6 <= steps_until_loaded(driver, rng, 300) <= load_bound(6)
    assert driver.counter("load_preemptions") > 0
    driver.run()
    driver.check_outputs()


def test_a_pinned_load_is_bounded_too() -> None:
    driver, rng = full_of_kv(1, patience=6)
    driver.scheduler.adapters.pin("largest")
    assert steps_until_loaded(driver, rng, 300) <= load_bound(6)


def test_a_load_for_what_was_accepted_before_an_unload_is_bounded_too() -> None:
    driver, rng = full_of_kv(1, patience=6)
    request = driver.submit([1, 2, 3], "largest", max_tokens=2)
    driver.scheduler.adapters.begin_unload("largest")
    assert steps_until_loaded(driver, rng, 300) <= load_bound(6)
    driver.run_until(lambda: driver.scheduler._roster.requests[request].started, 300)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_rule_a_load_waits_longer(seed: int) -> None:
    driver, rng = full_of_kv(seed, patience=None)
    driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert steps_until_loaded(driver, rng, 40) > load_bound(6)
    assert driver.counter("load_preemptions") == 0


def test_without_the_rule_a_load_may_starve() -> None:
    driver, rng = full_of_kv(0, patience=None)
    driver.submit([1, 2, 3], "largest", max_tokens=2)
    assert steps_until_loaded(driver, rng, 300) == 300


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

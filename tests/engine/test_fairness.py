"""The fair policy by what adapters are served, and the same traffic under fcfs, which lets one starve another."""

import random

import pytest

from engine.adapters.adapter import Adapter, Tally
from engine.fairness import Shares
from tests.engine.simulated import Driver, small_config


def adapter(name: str, weight: float = 1.0) -> Adapter:
    return Adapter(ord(name), name, name, None, pinned=False, created=0.0, weight=weight)


def test_a_counter_grows_by_weighted_tokens() -> None:
    shares, heavy = Shares(Tally()), adapter("a", weight=4.0)
    shares.charge(heavy, prompt=8, generated=2)
    shares.charge(None, prompt=8, generated=2)
    assert (shares.served(heavy), shares.served(None)) == (3.0, 12.0)


def test_idleness_saves_nothing_up() -> None:
    shares, busy, late = Shares(Tally()), adapter("a"), adapter("b")
    shares.charge(busy, prompt=100)
    shares.joins(late, [busy])
    assert shares.served(late) == 100.0
    shares.charge(late, prompt=50)
    shares.leaves(late)
    shares.leaves(busy)
    shares.joins(None, [])
    assert shares.served(None) == shares.served(busy) == 100.0


def test_who_was_served_more_is_not_lifted_down() -> None:
    shares, busy, late = Shares(Tally()), adapter("a"), adapter("b")
    shares.charge(late, prompt=70)
    shares.joins(late, [busy])
    assert shares.served(late) == 70.0


def flooded(policy: str, *, weights: tuple[float, float] = (1.0, 1.0)) -> Driver:
    """One adapter has hundreds of requests waiting before the other's first."""
    driver = Driver(
        small_config(num_chunks=120, max_running=4, prefill_tokens=32, max_slots=2, policy=policy, prefix_cache=False)
    )
    for name, weight in zip(("flood", "light"), weights, strict=True):
        driver.add(name)
        driver.scheduler.adapters.catalog.named(name).weight = weight
    rng = random.Random(3)
    for _ in range(150):
        driver.submit([rng.randrange(50)] * 4, "flood", max_tokens=6, ignore_eos=True)
    for _ in range(10):
        driver.step()
    return driver


def steps_to_finish(driver: Driver, requests: list[int]) -> int:
    first = driver.scheduler.stats().step
    driver.run_until(lambda: all(driver.requests[request].finish for request in requests))
    return driver.scheduler.stats().step - first


def test_an_adapter_that_floods_does_not_starve_another() -> None:
    waits = {}
    for policy in ("fcfs", "fair"):
        driver = flooded(policy)
        waits[policy] = steps_to_finish(driver, [driver.submit([1] * 4, "light", max_tokens=6, ignore_eos=True)])
    assert waits["fair"] <= 6 + 6 + 4  # the rows that run end, then it runs
    assert waits["fcfs"] > 10 * waits["fair"]


def test_the_base_has_its_share_too() -> None:
    driver = flooded("fair")
    assert steps_to_finish(driver, [driver.submit([1] * 4, max_tokens=6, ignore_eos=True)]) <= 6 + 6 + 4


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
def test_backlogged_adapters_are_served_by_weight(weight: float) -> None:
    driver = flooded("fair", weights=(1.0, weight))
    for _ in range(150):
        driver.submit([2] * 4, "light", max_tokens=6, ignore_eos=True)
    catalog = driver.scheduler.adapters.catalog
    before = {name: catalog.named(name).tally.generated_tokens for name in ("flood", "light")}
    for _ in range(160):
        driver.step()
    served = {name: catalog.named(name).tally.generated_tokens - before[name] for name in before}
    assert served["light"] / served["flood"] == pytest.approx(weight, rel=0.2)


def test_outputs_do_not_depend_on_the_policy() -> None:
    for policy in ("fcfs", "priority", "fair"):
        driver = flooded(policy)
        driver.submit([1, 2, 3], "light", n=3)
        driver.run()
        driver.check_outputs()
        driver.check_empty()

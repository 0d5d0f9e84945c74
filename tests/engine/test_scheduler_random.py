"""Seeded random histories against the reference: whatever happens around it, a request gives what it gives alone."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from engine.eviction import Costs
from engine.types import EngineError, ErrorCode
from tests.engine.simulated import Driver, random_prompt, small_config


def expect(error: EngineError, *codes: ErrorCode) -> None:
    if error.code not in codes:
        raise error


class History:
    """Draws operations: requests of every kind, aborts, loads, also in place, unloads, pins, changed sources, steps."""

    NAMES = ("a", "b", "c", "d", "e")

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver = driver
        self.rng = random.Random(seed)
        self.unloading: set[str] = set()

    def run(self, operations: int) -> None:
        for _ in range(operations):
            self.operation()()
        self.driver.late_loads = False
        self.end_unloads()
        self.driver.run()
        self.end_unloads()

    def operation(self) -> Callable[[], object]:
        weights: dict[Callable[[], object], int] = {
            self.submit: 8,
            self.driver.plan: 14,
            self.driver.commit: 14,
            self.finish_load: 9,
            self.abort: 2,
            self.load: 2,
            self.replace: 1,
            self.begin_unload: 1,
            self.end_unloads: 2,
            self.pin: 1,
            self.change: 1,
            self.fail_load: 1,
        }
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def submit(self) -> None:
        rng = self.rng
        known = [info.name for info in self.driver.scheduler.adapters.infos()]
        prompt = random_prompt(rng, 24)
        try:
            self.driver.submit(
                prompt,
                rng.choice([None, *known]),
                n=rng.choice([1, 1, 1, 2, 4]),
                max_tokens=rng.choice([0, 1, 2, 5, 40 - len(prompt)]),
                salt=rng.choice([None, None, "s"]),
                priority=rng.randrange(3) * (self.driver.config.policy == "priority"),
                min_tokens=rng.choice([0, 0, 3]),
                stop_token_ids=rng.choice([(), (1, 2, 3, 4, 5)]),
                ignore_eos=rng.random() < 0.3,
                prompt_logprobs=rng.choice([None, None, None, 0]),
            )
        except EngineError as error:
            expect(error, ErrorCode.ADAPTER_NOT_FOUND, ErrorCode.ADAPTER_UNAVAILABLE, ErrorCode.QUEUE_FULL)

    def abort(self) -> None:
        if self.driver.requests:
            request_id = self.rng.choice(list(self.driver.requests))
            self.driver.abort(request_id, self.rng.choice([None, 0, 1]))

    def finish_load(self) -> None:
        if self.rng.random() < 0.5:
            self.driver.finish_copies(1)
        else:
            self.driver.finish_fetches(1)

    def fail_load(self) -> None:
        control = self.driver.scheduler.adapters
        if self.driver.copying and self.rng.random() < 0.5:
            self.driver.fail(control.load_failed(self.driver.copying.pop(), "broken link", self.driver.now))
        elif self.driver.fetching:
            self.driver.fail(control.host_failed(self.driver.fetching.pop(), "gone", self.driver.now))

    def load(self) -> None:
        name = self.rng.choice(self.NAMES)
        try:
            self.driver.add(name, self.rng.randint(1, 4), cold=self.rng.random() < 0.2)
        except EngineError as error:
            if error.code is ErrorCode.ADAPTER_UNAVAILABLE:
                adapter_id = self.driver.adapter_id(name)
                self.driver.fail(self.driver.scheduler.adapters.host_failed(adapter_id, error.message, self.driver.now))
            else:
                expect(error, ErrorCode.ADAPTER_EXISTS)

    def replace(self) -> None:
        names = [i.name for i in self.driver.scheduler.adapters.infos() if i.name not in self.unloading]
        if names:
            try:
                self.driver.replace(self.rng.choice(names), self.rng.randint(1, 4))
            except EngineError as error:
                expect(error, ErrorCode.ADAPTER_UNAVAILABLE, ErrorCode.INVALID_REQUEST)

    def begin_unload(self) -> None:
        names = [i.name for i in self.driver.scheduler.adapters.infos() if i.name not in self.unloading]
        if names:
            name = self.rng.choice(names)
            self.driver.scheduler.adapters.begin_unload(name)
            self.unloading.add(name)
            if self.rng.random() < 0.3:
                self.driver.fail(self.driver.scheduler.adapters.fail_requests(name, "took too long"))

    def end_unloads(self) -> None:
        control = self.driver.scheduler.adapters
        for name in sorted(self.unloading):
            if control.drained(name):
                self.driver.worker.host.pop(control.finish_unload(name), None)
                self.unloading.remove(name)
        self.driver.check()

    def pin(self) -> None:
        names = [i.name for i in self.driver.scheduler.adapters.infos() if i.name not in self.unloading]
        for name in names:
            self.driver.scheduler.adapters.unpin(name)
        if names and self.rng.random() < 0.5:
            try:
                self.driver.scheduler.adapters.pin(self.rng.choice(names))
            except EngineError as error:
                expect(error, ErrorCode.INVALID_REQUEST)

    def change(self) -> None:
        if self.driver.sources:
            self.driver.change_source(self.rng.choice(list(self.driver.sources)))


def play(seed: int, operations: int = 400) -> Driver:
    """One history in an arena, with flags and a loop drawn from the seed."""
    rng = random.Random(seed)
    config = small_config(
        num_chunks=rng.choice([14, 18, 30]),
        prefill_tokens=rng.choice([5, 12, None]),
        prefix_cache=rng.random() < 0.8,
        policy=rng.choice(["fcfs", "priority", "fair"]),
        max_queued=rng.choice([None, 6]),
        max_loaded=rng.choice([None, 2, 3]),
        max_host_pages=rng.choice([None, 8]),
        max_slots=rng.choice([1, 2, 3]),
        patience=rng.choice([1, 4, None]),
        prefetch=rng.random() < 0.8,
        costs=rng.choice([None, Costs(block=2.0, chunk=1.0, load=4.0)]),
        decode_steps=rng.choice([0, 1, 3]),
    )
    driver = Driver(config, overlap=rng.random() < 0.7, late_loads=True)
    History(driver, seed).run(operations)
    driver.check_outputs()
    driver.check_empty()
    return driver


@pytest.mark.parametrize("seed", range(40))
def test_histories(seed: int) -> None:
    play(seed)


def test_the_histories_meet_every_situation() -> None:
    seen = Counter[str]()
    for seed in range(100, 112):
        stats = play(seed).scheduler.stats()
        seen.update(stats.counters)
        seen.update(stats.evictions)
        seen.update(stats.loads)
    situations = [
        "preemptions", "resumptions", "prefix_hit_tokens", "prefix/memory", "arena/memory", "arena/host",
        "arena/unload", "arena/replaced", "arena/failed", "host/capacity", "skips_not_resident", "skips_no_slot",
        "slot_reservations", "mixed_steps", "mixed_adapter_steps", "discarded_rows", "aborted", "failed",
        "finished_stop", "finished_length", "device/failed", "drains", "adapters_replaced", "adapter_hits",
        "adapter_misses",
    ]  # fmt: skip
    assert [name for name in situations if not seen[name]] == []

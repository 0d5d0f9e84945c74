"""Work in the breaks between steps: never beside one, for a while at most, and at once where there are no steps."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from engine.worker.breaks import Breaks

LONG = 1000.0  # as a share: a break that a test would not outlast


def test_work_waits_for_the_step_that_runs_and_the_next_step_for_the_work() -> None:
    breaks, begun, parts = Breaks(LONG), threading.Event(), list[str]()

    def work() -> None:
        parts.append("first")
        breaks.turn()
        parts.append("second")

    def submitted() -> None:
        begun.set()
        breaks.work(work)

    with ThreadPoolExecutor(1) as pool:
        with breaks.step():
            job = pool.submit(submitted)
            begun.wait()
            assert not parts
        while not breaks._working and not job.done():  # it has come as far as its first turn
            pass
        with breaks.step():
            assert parts == ["first", "second"]


def test_a_break_ends_though_work_goes_on() -> None:
    breaks, go = Breaks(0.1), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with breaks.step():
            pass
        job = pool.submit(breaks.work, go.wait)
        while not breaks._working:
            pass
        with breaks.step():
            assert not job.done()
        go.set()
        assert job.result()


def test_a_turn_in_a_step_comes_when_it_has_ended() -> None:
    breaks, arrived, parts = Breaks(0.001), threading.Event(), list[int]()

    def work() -> None:
        for part in range(3):
            breaks.turn()
            parts.append(part)
            if not part:
                arrived.set()

    with ThreadPoolExecutor(1) as pool:
        with breaks.step():
            job = pool.submit(breaks.work, work)
            assert not arrived.wait(0.02)
        job.result()
    assert parts == [0, 1, 2]


def test_work_goes_on_behind_a_step_that_fails() -> None:
    breaks = Breaks(LONG)
    with pytest.raises(ValueError, match="of the step"), breaks.step():
        raise ValueError("of the step")
    assert breaks.work(lambda: 1) == 1


def test_work_that_fails_holds_no_step_up() -> None:
    breaks = Breaks(LONG)
    with breaks.step():
        pass
    with pytest.raises(ZeroDivisionError):
        breaks.work(lambda: 1 / 0)
    with breaks.step():
        pass


def test_without_a_share_nobody_waits() -> None:
    breaks = Breaks()
    with breaks.step():
        assert breaks.work(lambda: 1) == 1


def test_a_break_is_one_jobs_and_the_next_anothers() -> None:
    breaks, order = Breaks(1e6 * LONG), list[int]()

    def work(name: int) -> None:
        order.append(name)
        while not breaks._due:  # the next step waits
            pass
        breaks.turn()
        order.append(name)

    def step_after(parts: int) -> None:
        while len(order) != parts:
            pass
        breaks._until = 0.0  # the break is over
        with breaks.step():
            assert len(order) == parts

    with ThreadPoolExecutor(2) as pool:
        with breaks.step():
            jobs = [pool.submit(breaks.work, partial(work, name)) for name in range(2)]
            while len(breaks._queue) != 2:
                pass
        step_after(1)
        step_after(2)
        for job in jobs:
            job.result()
    first, second = order[:2]
    assert first != second
    assert order == [first, second, first, second]

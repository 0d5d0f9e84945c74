"""Work in the breaks between steps: never beside one, for a while at most, and at once where there are no steps."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from engine.worker.breaks import LEAST, Breaks

LONG = 1000.0  # as a share: a break that a test would not outlast


def until(happened: Callable[[], object]) -> None:
    while not happened():
        time.sleep(0)


@contextmanager
def stepping(breaks: Breaks) -> Iterator[None]:
    """A step of usual length, as far as the break behind it knows."""
    breaks._usual = 1.0
    with breaks.step():
        yield


def test_work_waits_for_the_step_that_runs_and_the_step_ends_behind_its_break() -> None:
    breaks, begun, parts = Breaks(LONG), threading.Event(), list[str]()

    def submitted() -> None:
        begun.set()
        breaks.work(lambda: parts.append("done"))

    with ThreadPoolExecutor(1) as pool:
        with stepping(breaks):
            job = pool.submit(submitted)
            begun.wait()
            until(lambda: breaks._queue)
            assert not parts
        assert parts == ["done"]
        job.result()


def test_a_break_ends_though_work_goes_on() -> None:
    breaks, go, begun = Breaks(0.01), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait()

    with ThreadPoolExecutor(1) as pool:
        with stepping(breaks):
            job = pool.submit(breaks.work, work)
            until(lambda: breaks._queue)
        assert begun.is_set()
        with stepping(breaks):
            assert not job.done()
        go.set()
        job.result()


@pytest.mark.parametrize(
    ("seconds", "length"), [(1.0, 0.2), (1.05, 0.15), (0.5, 0.2), (1.01 + 0.2 * LEAST, None), (5.0, None)]
)
def test_a_break_is_shorter_by_what_its_step_took_longer_than_usual(seconds: float, length: float | None) -> None:
    breaks, waited = Breaks(0.2), list[float]()

    def noted(predicate: Callable[[], bool], timeout: float) -> bool:
        waited.append(timeout)
        return predicate()

    breaks._working, breaks._usual = 1, 1.0
    breaks._changed.wait_for = noted  # type: ignore[assignment,method-assign]
    with breaks._changed:
        breaks._rest(seconds)
    assert waited[:1] == ([] if length is None else [pytest.approx(length, abs=0.01)])  # what is usual has moved


def test_what_is_usual_follows_the_steps() -> None:
    breaks = Breaks(0.2)
    for seconds in [1.0] + [2.0] * 100:
        with breaks._changed:
            breaks._rest(seconds)
    assert breaks._usual == pytest.approx(2.0, abs=0.01)


def test_work_between_two_steps_waits_for_a_break() -> None:
    breaks, parts = Breaks(LONG), list[int]()
    with ThreadPoolExecutor(1) as pool:
        with breaks.step():
            pass
        breaks._idle = time.perf_counter() + 1e6  # another step follows
        job = pool.submit(breaks.work, partial(parts.append, 1))
        until(lambda: breaks._queue)
        assert not parts
        with stepping(breaks):
            assert not parts
        job.result()
    assert parts == [1]


def test_work_goes_on_where_no_step_follows() -> None:
    breaks = Breaks(LONG)
    with breaks.step():
        pass
    assert breaks.work(lambda: 1) == 1


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
    breaks, order = Breaks(0.5), list[int]()

    def work(name: int) -> None:
        for _ in range(2):
            order.append(name)
            until(lambda: time.perf_counter() >= breaks._until)  # the break is over
            breaks.turn()

    with ThreadPoolExecutor(2) as pool:
        with breaks.step():
            jobs = [pool.submit(breaks.work, partial(work, name)) for name in range(2)]
            until(lambda: len(breaks._queue) == 2)
            breaks._usual = 0.1
        for parts in (1, 2, 3):
            breaks._idle = time.perf_counter() + 1e6  # another step follows
            with breaks.step():
                breaks._usual = 0.1
                until(lambda: len(breaks._queue) == breaks._working)
                assert len(order) == parts
        breaks._idle = 0.0
        for job in jobs:
            job.result()
    first, second = order[:2]
    assert first != second
    assert order == [first, second, first, second]

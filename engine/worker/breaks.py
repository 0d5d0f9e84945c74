"""Where steps take every core, work beside them runs in the breaks between two steps, and only then.

On the same cores a step and a load hold each other up for longer than both take by themselves: a thread of the step's
team that has lost its core keeps the others waiting at every operation, and so does whoever has the interpreter.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

BREAK_SHARE = 0.2  # of the step before: how long a break is while there is work for it
T = TypeVar("T")


def at_once() -> None:
    """A turn where there are no steps to give way to."""


class Breaks:
    """Steps come from one thread, work from any others. With a share of 0 nobody ever waits."""

    def __init__(self, share: float = 0.0) -> None:
        self._share = share
        self._changed = threading.Condition()
        self._stepping = False
        self._working = 0  # jobs under way
        self._waiting = 0  # of them those that wait for their turn
        self._length = 0.0  # how long the break is, in seconds
        self._until = 0.0  # when it is over, in seconds of time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, after the break for work that is under way: it begins between two parts of each job."""
        if not self._share:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._working, max(0.0, self._until - time.perf_counter()))
            self._stepping = True  # a part that takes too long, because it waits for a disk, is not waited for
            self._changed.wait_for(lambda: self._waiting == self._working, self._length)
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                ended = time.perf_counter()
                self._length = self._share * (ended - started)
                self._until = ended + self._length
                self._stepping = False
                self._changed.notify_all()

    def work(self, job: Callable[[], T]) -> T:
        """Runs a job that calls `turn` between its parts, each far shorter than a break."""
        with self._changed:
            self._working += 1
        try:
            self.turn()
            return job()
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def turn(self) -> None:
        """Returns when no step runs. The thread of the steps never calls it."""
        if self._stepping:
            with self._changed:
                self._waiting += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._stepping)
                self._waiting -= 1

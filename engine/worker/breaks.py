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
    """Steps come from one thread, work from any others. With a share of 0 nobody ever waits.

    In a break one job works, the next break is another's: several at once would keep the core from the tokens of the
    step before, which are on their way then, and take the interpreter from each other in the middle of a part.
    """

    def __init__(self, share: float = 0.0) -> None:
        self._share = share
        self._changed = threading.Condition()
        self._stepping = False
        self._due = False  # a step waits for the end of the break
        self._working = 0  # jobs under way
        self._queue: list[int] = []  # threads of them that wait for their turn, in order
        self._active: int | None = None  # the one that has this break
        self._length = 0.0  # how long the break is, in seconds
        self._until = 0.0  # when it is over, in seconds of time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, after the break for work that is under way: it begins between two parts of each job."""
        if not self._share:
            yield
            return
        with self._changed:
            self._due = True
            self._changed.wait_for(lambda: not self._working, max(0.0, self._until - time.perf_counter()))
            self._stepping = True  # a part that takes too long, because it waits for a disk, is not waited for
            self._changed.wait_for(lambda: len(self._queue) == self._working, self._length)
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                ended = time.perf_counter()
                self._length = self._share * (ended - started)
                self._until = ended + self._length
                self._stepping = self._due = False
                self._active = None
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
                if self._active == threading.get_ident():
                    self._active = None
                self._changed.notify_all()

    def turn(self) -> None:
        """Returns when no step runs and no other job has the break. The thread of the steps never calls it."""
        if not self._share or self._free(thread := threading.get_ident()):
            return
        with self._changed:
            self._queue.append(thread)
            self._changed.notify_all()
            while not self._begins(thread):
                to_come = self._stepping or self._due  # a step, whose end is told
                self._changed.wait(None if to_come else max(0.0, self._until - time.perf_counter()))
            self._queue.remove(thread)

    def _free(self, thread: int) -> bool:
        """Whether a job that works may go on: its break lasts, or there is neither a step nor a break."""
        if time.perf_counter() < self._until:
            return self._active == thread and not self._stepping
        return not (self._stepping or self._due)

    def _begins(self, thread: int) -> bool:
        """Whether a job that waits may go on; who is first in the queue takes the break. Holds the lock."""
        if self._active is None and self._queue[0] == thread and not self._stepping:
            self._active = thread
        return self._free(thread)

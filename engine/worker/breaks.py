"""Where steps take every core, work beside them runs in the breaks between two steps, and only then.

On the same cores a step and a load hold each other up for longer than both take by themselves: a thread of the step's
team that has lost its core keeps the others waiting at every operation, and so does whoever has the interpreter.

A break comes behind its step and before the step's tokens are told. So streams see a step and its break as one, and
both together can be kept to what is usual: behind a long step there is no break.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

BREAK_SHARE = 0.2  # of a usual step: how long a break is while there is work for it
USUAL_STEPS = 16  # over about so many a step's usual length is taken
LEAST = 0.5  # of a whole break: in a shorter one a part of the work would take longer than it
NEXT_STEP = 0.005  # seconds in which another step follows, or there is none to give way to
T = TypeVar("T")


def at_once() -> None:
    """A turn where there are no steps to give way to."""


class Breaks:
    """Steps come from one thread, work from any others. With a share of 0 nobody ever waits.

    In a break one job works, the next break is another's: several at once would take the interpreter from each other in
    the middle of a part. Where no steps come, all work.
    """

    def __init__(self, share: float = 0.0) -> None:
        self._share = share
        self._changed = threading.Condition()
        self._usual = 0.0  # how long a step takes, in seconds
        self._stepping = False
        self._working = 0  # jobs under way
        self._queue: list[int] = []  # threads of them that wait for their turn, in order
        self._active: int | None = None  # the one that has this break
        self._until = 0.0  # when the break is over, in seconds of time.perf_counter()
        self._idle = 0.0  # when there are no steps, unless one begins before

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step and the break behind it. Both begin and end between two parts of each job."""
        if not self._share:
            yield
            return
        with self._changed:
            self._halt()
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                self._rest(time.perf_counter() - started)

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
                self._changed.wait(None if self._stepping else max(0.0, self._idle - time.perf_counter()))
            self._queue.remove(thread)

    def _halt(self) -> None:
        """Waits until no job works. Holds the lock."""
        self._stepping = True  # a part that takes too long, because it waits for a disk, is not waited for
        self._changed.wait_for(lambda: len(self._queue) == self._working, self._share * self._usual)

    def _rest(self, seconds: float) -> None:
        """The break behind a step that took so long: shorter by what that is more than usual. Holds the lock."""
        self._usual += (seconds - self._usual) / (USUAL_STEPS if self._usual else 1)
        whole = self._share * self._usual
        length = whole - max(0.0, seconds - self._usual)
        if self._working and length > LEAST * whole:
            self._active, self._until = None, time.perf_counter() + length
            self._idle = self._until + NEXT_STEP
            self._stepping = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._working, length)
            self._halt()
        self._until, self._idle = 0.0, time.perf_counter() + NEXT_STEP
        self._stepping = False
        self._changed.notify_all()

    def _free(self, thread: int) -> bool:
        """Whether a job that works may go on: it has the break, or there are no steps."""
        now = time.perf_counter()
        return not self._stepping and (now >= self._idle or (now < self._until and self._active == thread))

    def _begins(self, thread: int) -> bool:
        """Whether a job that waits may go on; who is first in the queue takes the break. Holds the lock."""
        if self._active is None and self._queue[0] == thread and not self._stepping:
            self._active = thread
        return self._free(thread)

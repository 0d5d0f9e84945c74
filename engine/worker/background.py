"""One thread of low priority for work that must not delay a step: page copies, merging of adapters."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable

import torch

NICENESS = 19


class BackgroundThread:
    """Runs jobs one after the other, in the order they were given. A job must handle its own errors."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread after the jobs already given."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        _lower_priority()
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                job()


def _lower_priority() -> None:
    """One core at most, and that only when the step leaves it: both settings hold for the calling thread alone."""
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    torch.get_num_threads()  # the first question sets this thread up, which would undo what is set before it
    torch.set_num_threads(1)

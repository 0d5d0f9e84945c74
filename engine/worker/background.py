"""One thread of low priority for work that must not delay a step: page copies, merging of adapters."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from engine.worker.breaks import Breaks

NICENESS = 10  # beside busy neighbours a tenth of a core: a load must not starve either, requests wait for it
log = logging.getLogger(__name__)


class BackgroundThread:
    """Runs jobs one after the other, in the order they were given. The interpreter waits for it when it ends."""

    def __init__(self, name: str, breaks: Breaks) -> None:
        self._breaks = breaks
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=lower_priority)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """What a job raises is logged; whoever must know of it is told by the job itself."""
        return self._executor.submit(_run, job, self._breaks)

    def close(self) -> None:
        """Ends the thread after the job that runs; those behind it are dropped."""
        self._executor.shutdown(cancel_futures=True)


@torch.inference_mode()
def _run(job: Callable[[], None], breaks: Breaks) -> None:
    try:
        breaks.work(job)
    except Exception:
        log.exception("background work failed")


def lower_priority() -> None:
    """One core at most, and that only when the step leaves it: both settings hold for the calling thread alone."""
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    torch.get_num_threads()  # the first question sets this thread up, which would undo what is set before it
    torch.set_num_threads(1)

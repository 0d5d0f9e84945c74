"""What Python's collector looks through, and when, while a process serves: it holds every thread up.

All that lives takes it tens of milliseconds with a hundred adapters loaded, and loads bring it about. Young objects,
among which nearly all garbage is, are looked through all the time.
"""

import contextlib
import gc
from collections.abc import Iterator

YOUNG, USUAL = 700, 10  # Python's defaults: new objects before a look through them, looks before one through more
RARE = 1000  # looks through the middle generation before one through all, where `collect_if_due` makes up for it


@contextlib.contextmanager
def collecting(*, young: int = YOUNG, whole: int = USUAL) -> Iterator[None]:
    """With these thresholds; what a process has made until now, all that it imported, is not looked through at all."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(young, USUAL, whole)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def collect_if_due() -> None:
    """For when nothing runs."""
    if gc.get_count()[2] > USUAL:
        gc.collect()

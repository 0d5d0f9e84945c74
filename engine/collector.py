"""What Python's collector looks through, and when, while the engine runs: it holds every thread up.

All that lives takes it tens of milliseconds with a hundred adapters loaded, and loads bring it about. Young objects,
among which nearly all garbage is, are looked through as always.
"""

import contextlib
import gc
from collections.abc import Iterator

USUAL, RARE = 10, 1000  # collections of the middle generation before one of all: by default, and while something runs


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """`collect_if_due` makes up for it. What has come so far is left out: to look through it takes 0.2 s."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*before[:2], RARE)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def collect_if_due() -> None:
    """For when nothing runs."""
    if gc.get_count()[2] > USUAL:
        gc.collect()

"""When Python's collector looks through all that lives: while nothing runs, for it holds every thread up.

That takes tens of milliseconds with a hundred adapters loaded, and loads bring it about. Young objects, among which
nearly all garbage is, are looked through as always.
"""

import gc

USUAL, RARE = 10, 1000  # collections of the middle generation before one of all: by default, and while something runs


def collect_rarely() -> None:
    """From now on; `collect_if_due` makes up for it."""
    gc.set_threshold(*gc.get_threshold()[:2], RARE)


def collect_if_due() -> None:
    """For when nothing runs."""
    if gc.get_count()[2] > USUAL:
        gc.collect()

"""What Python's collector looks through, and when: it holds every thread up.

All that lives takes it tens of milliseconds with a hundred adapters loaded, and loads bring it about. Young objects,
among which nearly all garbage is, are looked through as always.
"""

import gc

USUAL, RARE = 10, 1000  # collections of the middle generation before one of all: by default, and while something runs


def freeze_started() -> None:
    """What a process has made until it is ready stays: it is not looked through again."""
    gc.collect()
    gc.freeze()


def collect_rarely() -> None:
    """All that lives, from now on; `collect_if_due` makes up for it."""
    gc.set_threshold(*gc.get_threshold()[:2], RARE)


def collect_if_due() -> None:
    """For when nothing runs."""
    if gc.get_count()[2] > USUAL:
        gc.collect()

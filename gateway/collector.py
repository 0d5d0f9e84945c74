"""What Python's collector looks through, and when, while the gateway serves: every stream waits for it meanwhile."""

import contextlib
import gc
from collections.abc import Iterator

YOUNG = 5000  # objects made before the young are looked through: hundreds of streams make 700, as usual, every step


@contextlib.contextmanager
def collecting_less() -> Iterator[None]:
    """Young objects less often, and what has come so far, all that was imported, not at all."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()

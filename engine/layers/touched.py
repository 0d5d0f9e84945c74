"""Memory that was touched before anybody waits for it, lent in contiguous parts.

What the system gives costs up to a millisecond a MiB when it is first touched, and again after it was given back.
"""

from torch import Tensor

from engine.adapters.pages import fresh_pages

ALIGNMENT = 4096


class TouchedMemory:
    """`take` and `give`; first fit. Small: it counts on few parts at a time."""

    def __init__(self, nbytes: int) -> None:
        self._memory = fresh_pages(nbytes).zero_()
        self._lent: dict[int, int] = {}  # start -> end

    def take(self, nbytes: int) -> Tensor | None:
        """[nbytes] uint8 of any content, or None where no gap is so large."""
        start = 0
        for begin, end in sorted(self._lent.items()):
            if begin - start >= nbytes:
                break
            start = -(-end // ALIGNMENT) * ALIGNMENT
        if start + nbytes > len(self._memory):
            return None
        self._lent[start] = start + nbytes
        return self._memory[start : start + nbytes]

    def give(self, part: Tensor) -> None:
        """Takes back what was lent; whatever else it is given was never its own."""
        self._lent.pop(part.data_ptr() - self._memory.data_ptr(), None)

"""Memory that was touched before anybody waits for it, lent in contiguous parts.

What the system gives costs up to a millisecond a MiB when it is first touched, and again after it was given back.
"""

from torch import Tensor

from engine.adapters.pages import fresh_pages

ALIGNMENT = 4096


class TouchedMemory:
    """`take` and `give`. Small: it counts on few parts at a time."""

    def __init__(self, nbytes: int) -> None:
        self._memory = fresh_pages(nbytes).zero_()
        self._lent: dict[int, int] = {}  # start -> end

    def take(self, nbytes: int) -> Tensor | None:
        """[nbytes] uint8 of any content, or None where no gap is so large.

        From the smallest gap that is large enough; from the last, which is mostly the largest, its end, so that of two
        large parts one may be exchanged for a larger one beside the other.
        """
        size = len(self._memory)
        gaps, start = list[tuple[int, int]](), 0
        for begin, end in sorted(self._lent.items()):
            gaps.append((start, begin))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        large = [(first, end) for first, end in (*gaps, (start, size)) if end - first >= nbytes]
        if not large:
            return None
        first, end = min(large, key=lambda gap: gap[1] - gap[0])
        if first and end == size:
            first = max(first, (end - nbytes) // ALIGNMENT * ALIGNMENT)
        self._lent[first] = first + nbytes
        return self._memory[first : first + nbytes]

    def give(self, part: Tensor) -> None:
        """Takes back what was lent; whatever else it is given was never its own."""
        self._lent.pop(part.data_ptr() - self._memory.data_ptr(), None)

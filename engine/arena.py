"""Who owns each chunk of the arena. Called by blocks and residency, stepped by the scheduler; holds no memory itself.

A released chunk is free only when the last step that refers to it has committed. Blocks come from the arena's start,
adapters from its end, so that an adapter's chunks lie together as far as may be: neighbours are one copy.
"""

import enum
from collections.abc import Callable, Iterable

from sortedcontainers import SortedList


class ChunkUse(enum.StrEnum):
    """What a chunk holds."""

    FREE = "free"
    KV = "kv"  # a block of a running sequence
    PREFIX = "prefix"  # a cached block that no sequence refers to
    ADAPTER = "adapter"


class Arena:
    """Chunk ids 0..num_chunks-1, each with one use. Steps are numbered from 1 and commit in order."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.planned = 0  # the latest step planned
        self.committed = 0  # the latest step committed
        self.counts = dict.fromkeys(ChunkUse, 0)
        self.counts[ChunkUse.FREE] = num_chunks
        self._free = SortedList(range(num_chunks))
        self._use = [ChunkUse.FREE] * num_chunks
        self._last_step = [0] * num_chunks
        self._leaving: dict[int, list[int]] = {}  # step -> chunks that are free once it has committed
        self._coming = 0
        self.on_free: Callable[[int], None] = _ignore  # told of each chunk as it becomes free; for tests

    @property
    def free(self) -> int:
        """Chunks that can be taken now."""
        return len(self._free)

    @property
    def coming(self) -> int:
        """Released chunks that an uncommitted step still refers to; they count under their old use."""
        return self._coming

    def use(self, chunk: int) -> ChunkUse:
        return self._use[chunk]

    def last_step(self, chunk: int) -> int:
        """The last step known to refer to the chunk: told when a sequence or an adapter lets go of it."""
        return self._last_step[chunk]

    def take(self, count: int, use: ChunkUse) -> list[int]:
        """Takes free chunks, in ascending order; raises MemoryError when there are too few."""
        if count > len(self._free):
            raise MemoryError(f"{count} chunks wanted, {len(self._free)} free")
        first = len(self._free) - count if use is ChunkUse.ADAPTER else 0
        chunks = list(self._free.islice(first, first + count))
        del self._free[first : first + count]
        for chunk in chunks:
            self.set_use(chunk, use)
        return chunks

    def set_use(self, chunk: int, use: ChunkUse) -> None:
        self.counts[self._use[chunk]] -= 1
        self.counts[use] += 1
        self._use[chunk] = use

    def note(self, chunk: int, step: int) -> None:
        """Records that this step refers to the chunk."""
        if step > self._last_step[chunk]:
            self._last_step[chunk] = step

    def release(self, chunks: Iterable[int]) -> None:
        """Gives chunks back: at once, or when the last step noted for them has committed."""
        for chunk in chunks:
            step = self._last_step[chunk]
            if step <= self.committed:
                self._make_free(chunk)
            else:
                self._leaving.setdefault(step, []).append(chunk)
                self._coming += 1

    def commit(self, step: int) -> None:
        """The step's results are in: what only it and earlier ones referred to becomes free."""
        self.committed = step
        for done in [s for s in self._leaving if s <= step]:
            for chunk in self._leaving.pop(done):
                self._coming -= 1
                self._make_free(chunk)

    def owned(self, use: ChunkUse) -> set[int]:
        """Every chunk of this use that has not been released; walks the whole arena, for checks."""
        leaving = {chunk for chunks in self._leaving.values() for chunk in chunks}
        return {chunk for chunk, held in enumerate(self._use) if held is use} - leaving

    def check(self) -> None:
        """Raises AssertionError unless every chunk has exactly one use and no free one is referred to."""
        free, leaving = set(self._free), [c for chunks in self._leaving.values() for c in chunks]
        assert len(free) == len(self._free), "a chunk is free twice"
        assert len(set(leaving)) == len(leaving) == self._coming, "a chunk was released twice"
        assert not free & set(leaving), "a chunk is free and still leaving"
        assert free == {c for c, use in enumerate(self._use) if use is ChunkUse.FREE}, "free list and uses differ"
        assert sum(self.counts.values()) == self.num_chunks, "chunks were lost"
        assert all(self.counts[use] == self._use.count(use) for use in ChunkUse), "counts and uses differ"
        assert all(self._last_step[c] <= self.committed for c in free), "a free chunk is in an uncommitted step"
        assert all(step > self.committed for step in self._leaving), "a chunk was not freed at its commit"

    def _make_free(self, chunk: int) -> None:
        self.set_use(chunk, ChunkUse.FREE)
        self._free.add(chunk)
        self.on_free(chunk)


def _ignore(chunk: int) -> None:
    """Nobody wants to know."""

"""Makes chunks free when the arena is full: what goes first, and what never goes. Called by the scheduler.

One clock (engine/eviction.py) for cached blocks and idle adapters alike. Then forks, the blocks that waiting choices
keep of their request's prompt. Running sequences are the scheduler's to preempt.
"""

from collections.abc import Collection

from engine.adapters.residency import Residency
from engine.arena import Arena
from engine.blocks import Blocks
from engine.eviction import EvictionClock
from engine.sequence import Sequence

NOTHING: frozenset[int] = frozenset()


class Memory:
    """Obtains free chunks, and owns the forks."""

    def __init__(self, arena: Arena, blocks: Blocks, residency: Residency, clock: EvictionClock) -> None:
        self.prefix_evictions = 0
        self.forks: dict[int, Sequence] = {}  # sequence_id -> waiting sequence with blocks
        self._arena = arena
        self._clock = clock
        self._blocks = blocks
        self._residency = residency

    def obtain(self, count: int, protect: Collection[int] = NOTHING, spare: int = 0) -> bool:
        """Whether `count` chunks are free now, evicting as needed; adapter_ids in `protect` stay.

        Nothing is evicted in vain: where even all of it would not leave `spare` more, the answer is no at once.
        """
        while not self._reachable(count + spare, protect):
            if not self.forks:
                return False
            self.drop_fork()
        while self._arena.free < count:
            if not self._evict_one(protect):
                return False
        return True

    def soon(self) -> bool:
        """Whether a chunk will be free once the uncommitted steps have committed."""
        return self._arena.free + self._arena.coming + self._blocks.idle > 0

    def comes(self, count: int) -> bool:
        """Whether `count` chunks could be had once the uncommitted steps have committed, were nothing kept back."""
        near = self._arena.free + self._arena.coming + self._blocks.idle
        return near >= count or near + self._residency.idle_chunks(NOTHING, later=True) >= count

    def fork(self, parent: Sequence, child: Sequence, blocks: int) -> None:
        """The child keeps the parent's first blocks until it is admitted."""
        child.blocks = parent.blocks[:blocks]
        self._blocks.hold(child.blocks)
        if child.blocks:
            self.forks[child.sequence_id] = child

    def drop_fork(self, sequence: Sequence | None = None) -> None:
        """The sequence, by default the one that forked last, will compute its prompt itself."""
        if sequence is None:
            _, sequence = self.forks.popitem()
        else:
            self.forks.pop(sequence.sequence_id, None)
        self._blocks.drop(sequence.blocks, sequence.last_step)
        sequence.blocks = []

    def _reachable(self, count: int, protect: Collection[int]) -> bool:
        near = self._arena.free + self._blocks.idle
        return near >= count or near + self._residency.idle_chunks(protect) >= count

    def _evict_one(self, protect: Collection[int]) -> bool:
        block = self._blocks.oldest()
        adapter = self._residency.next_victim(protect)
        if block is not None and (adapter is None or self._clock.block(block) <= self._clock.adapter(adapter)):
            self._clock.evicted(self._clock.block(block))
            self._blocks.evict()
            self.prefix_evictions += 1
        elif adapter is not None:
            self._clock.evicted(self._clock.adapter(adapter))
            self._residency.evict(adapter, "memory")
        else:
            return False
        return True

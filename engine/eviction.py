"""The order in which cached blocks and idle adapters leave a full arena. Kept by memory, read by blocks and residency.

With costs it is GreedyDual: an entry stands at the clock when it was let go plus what a chunk of it costs to bring
back, the lowest goes, and the clock moves on to where that one stood. Without, it is least recently used.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.adapters.adapter import Adapter
from engine.arena import Arena


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds to bring back; only their ratios count."""

    block: float  # computing a block's tokens again
    chunk: float  # copying one chunk of an adapter
    load: float  # what a load takes beside its bytes


def estimated_costs(block_tokens: int, chunk_bytes: int, *, on_gpu: bool) -> Costs:
    """Rough, and known before anything is measured: `make simulate` shows how little the exact ratio matters."""
    token, bandwidth, load = (5e-5, 2e10, 0.02) if on_gpu else (2e-3, 4e9, 0.1)
    return Costs(block=block_tokens * token, chunk=chunk_bytes / bandwidth, load=load)


class EvictionClock:
    """`costs` None: the clock counts planned steps and every chunk weighs the same."""

    def __init__(self, arena: Arena, costs: Costs | None = None) -> None:
        self._arena = arena
        self._costs = costs
        self._now = 0.0

    @property
    def now(self) -> float:
        """What an entry is stamped with when it is let go."""
        return float(self._arena.planned) if self._costs is None else self._now

    def block(self, stamp: float) -> float:
        """Where a cached block stands."""
        return stamp if self._costs is None else stamp + self._costs.block

    def adapter(self, adapter: Adapter) -> float:
        """Where an idle adapter stands."""
        if self._costs is None:
            return adapter.idle_since
        return adapter.idle_since + self._costs.chunk + self._costs.load / max(adapter.pages, 1)

    def first(self, idle: Iterable[Adapter]) -> Adapter | None:
        """The adapter that goes first; `idle` come in the order in which they were let go."""
        return next(iter(idle), None) if self._costs is None else min(idle, key=self.adapter, default=None)

    def evicted(self, place: float) -> None:
        """What stood there is gone."""
        self._now = max(self._now, place)

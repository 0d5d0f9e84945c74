"""Shares of the engine: virtual token counters, one an adapter and one for the base. Called by queue and roster.

A counter grows by what its adapter was served, over its weight; who has the smallest is next. One that had nothing
waiting is lifted to the least of those that had, so that idleness saves nothing up. (VTC, arXiv 2401.00588.)
"""

from collections.abc import Collection

from engine.adapters.adapter import Adapter, Tally

PROMPT_TOKEN = 1.0  # what a token adds; one that is generated takes a row of a step of its own
GENERATED_TOKEN = 2.0


class Shares:
    """The counters are in the adapters' tallies, and go with them."""

    def __init__(self, base: Tally) -> None:
        self._base = base
        self._last = 0.0  # the counter of who last had nothing left waiting

    def served(self, adapter: Adapter | None) -> float:
        """Weighted tokens, lifts included."""
        return self._tally(adapter).served

    def charge(self, adapter: Adapter | None, prompt: int = 0, generated: int = 0) -> None:
        """These tokens are computed for it."""
        weight = 1.0 if adapter is None else adapter.weight
        self._tally(adapter).served += (PROMPT_TOKEN * prompt + GENERATED_TOKEN * generated) / weight

    def joins(self, adapter: Adapter | None, waiting: Collection[Adapter | None]) -> None:
        """It has something waiting again, as `waiting` have."""
        least = min((self.served(other) for other in waiting), default=self._last)
        tally = self._tally(adapter)
        tally.served = max(tally.served, least)

    def leaves(self, adapter: Adapter | None) -> None:
        """It has nothing waiting any more."""
        self._last = self.served(adapter)

    def _tally(self, adapter: Adapter | None) -> Tally:
        return self._base if adapter is None else adapter.tally

"""Starts copies of adapters into the arena, and makes room for the one that has waited for its bound. For the planner.

A copy is started for whoever comes first in the queue, never at the cost of an adapter that is wanted earlier.
"""

from collections.abc import Collection

from engine.adapters.adapter import Adapter
from engine.adapters.residency import Residency
from engine.ageing import LoadQueue, SlotQueue
from engine.draft import MAX_AHEAD, Draft, PlanLimits
from engine.memory import Memory
from engine.roster import Roster
from engine.slots import Slots
from engine.stats import Recorder


class Loading:
    """Decides; `queue` holds who found no memory."""

    def __init__(
        self, limits: PlanLimits, memory: Memory, residency: Residency, slots: Slots, roster: Roster,
        slot_queue: SlotQueue, recorder: Recorder,
    ) -> None:  # fmt: skip
        self.queue = LoadQueue(limits.patience)
        self._prefetch = limits.prefetch
        self._memory = memory
        self._residency = residency
        self._slots = slots
        self._roster = roster
        self._slot_queue = slot_queue
        self._count = recorder.counters

    def start(self, draft: Draft, pinned: Collection[Adapter]) -> None:
        """Pinned adapters, then those wanted first in the queue; those without a slot only as prefetch."""
        earlier = self.queue.kept
        starved = []
        for adapter in [*pinned, *draft.wanted]:
            earlier.add(adapter.adapter_id)
            if not adapter.on_host or adapter.chunks or adapter.error is not None:
                continue
            needed = adapter.pinned or self._may_run(adapter)
            if (needed or self._prefetch) and not self._copy(draft, adapter, earlier) and needed:
                starved.append(adapter)
        self.queue.starved(starved, draft.step)

    def overdue(self, draft: Draft) -> None:
        """The load whose bound has passed goes before everything else, and running sequences make way for it."""
        adapter = self.queue.overdue(draft.step)
        if adapter is None:
            return
        while not self._memory.comes(adapter.pages + MAX_AHEAD * len(self._roster.running)):  # which may grow meanwhile
            if self._memory.forks:
                self._memory.drop_fork()
            elif self._roster.preempt_latest():
                self._count["preemptions"] += 1
                self._count["load_preemptions"] += 1
            else:
                break
        self._copy(draft, adapter, ())

    def _may_run(self, adapter: Adapter) -> bool:
        """Whether its sequences find a slot, or have one kept for them."""
        return adapter is self._slot_queue.owner or self._slots.available(adapter.adapter_id)

    def _copy(self, draft: Draft, adapter: Adapter, protect: Collection[int]) -> bool:
        if not self._memory.obtain(adapter.pages, protect):
            return False
        if adapter is self.queue.due(draft.step):
            self.queue.granted(adapter)
            self._count["load_reservations"] += 1
        draft.loads.append(self._residency.place(adapter))
        return True

"""Where adapters are: chunks in the arena, pages on the host, pins, copies in flight. Called by memory and scheduler.

Resident means on the host too, so eviction from the arena needs no copy back. Never evicted: pinned adapters, those
of running sequences or of an uncommitted step, and those being copied.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.adapters.adapter import Adapter, Hosted
from engine.arena import Arena, ChunkUse
from engine.eviction import EvictionClock
from engine.plan import AdapterLoad
from engine.slots import Slots
from engine.types import EngineError, ErrorCode


class HostFullError(EngineError):
    """Nothing on the host can go now; it may later."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.ADAPTER_UNAVAILABLE, message)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds adapters on each tier."""

    max_pins: int  # one slot and one place on the host are left to the others
    max_loaded: int | None  # names of adapters on the host; None: as many as fit
    max_host_pages: int | None
    max_adapter_chunks: int  # of the largest adapter that the server accepts
    context_blocks: int  # of one full context


class Residency:
    """Holds no adapters of its own: it changes the places of those it is given."""

    def __init__(self, arena: Arena, slots: Slots, limits: Limits, clock: EvictionClock | None = None) -> None:
        self.limits = limits
        self._eviction = EvictionClock(arena) if clock is None else clock
        self.evictions: Counter[str] = Counter()  # "tier/reason"
        self._arena = arena
        self._slots = slots
        self._resident: dict[int, Adapter] = {}  # with chunks, ready or being copied; by adapter_id
        self._idle: OrderedDict[int, Adapter] = OrderedDict()  # ready, without running sequences; oldest first
        self._host: dict[int, Adapter] = {}  # with pages held or reserved
        self._evicted: list[int] = []  # adapter_ids that left the arena, for the worker to forget
        self._clock = 0

    @property
    def resident(self) -> int:
        """Adapters in the arena, those being copied included."""
        return len(self._resident)

    @property
    def host_pages(self) -> int:
        return sum(adapter.host_pages for adapter in self._host.values())

    def touch(self, adapter: Adapter) -> None:
        """It was used: it goes last."""
        self._clock += 1
        adapter.touched = self._clock

    # Arena

    def place(self, adapter: Adapter) -> AdapterLoad:
        """Gives the adapter chunks; the caller has seen to it that they are free. It is ready after `placed`."""
        assert adapter.on_host
        assert not adapter.chunks
        adapter.chunks = self._arena.take(adapter.pages, ChunkUse.ADAPTER)
        adapter.copying = adapter.fresh = True
        adapter.last_step = 0
        self._resident[adapter.adapter_id] = adapter
        return AdapterLoad(adapter.adapter_id, tuple(adapter.chunks))

    def placed(self, adapter: Adapter) -> None:
        """The copy has finished."""
        adapter.copying = False
        adapter.error = None
        self._now_idle(adapter)

    def acquire(self, adapter: Adapter) -> int:
        """One more running sequence; returns the slot. The caller has asked `Slots.available`."""
        self._idle.pop(adapter.adapter_id, None)
        self.touch(adapter)
        return self._slots.acquire(adapter.adapter_id)

    def release(self, adapter: Adapter, last_step: int, running: int) -> None:
        """One running sequence less, `running` are left; `last_step` is the last step with a row of it."""
        adapter.last_step = max(adapter.last_step, last_step)
        self._slots.release(adapter.adapter_id)
        self.touch(adapter)
        if not running:
            self._now_idle(adapter)

    def next_victim(self, protect: Collection[int]) -> Adapter | None:
        """The adapter that eviction takes first, none of `protect` (adapter_ids)."""
        return self._eviction.first(a for a in self._idle.values() if self._evictable(a, protect))

    def idle_chunks(self, protect: Collection[int], *, later: bool = False) -> int:
        """Chunks that evicting every idle adapter but `protect` would free; `later`: after the uncommitted steps."""
        if later:
            return sum(len(a.chunks) for a in self._idle.values() if not a.pinned)
        return sum(len(a.chunks) for a in self._idle.values() if self._evictable(a, protect))

    def evict(self, adapter: Adapter, reason: str) -> None:
        """Takes an adapter out of the arena; its chunks are free when the last step that refers to them commits."""
        self._idle.pop(adapter.adapter_id, None)
        del self._resident[adapter.adapter_id]
        self._slots.clear(adapter.adapter_id)
        for chunk in adapter.chunks:
            self._arena.note(chunk, adapter.last_step)
        self._arena.release(adapter.chunks)
        adapter.chunks, adapter.copying, adapter.awaited = [], False, False
        self.evictions[f"arena/{reason}"] += 1
        self._evicted.append(adapter.adapter_id)

    def take_evicted(self) -> list[int]:
        """adapter_ids that left the arena since the last call, in order."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def in_flight(self, adapter: Adapter) -> bool:
        """Whether an uncommitted step has rows of the adapter."""
        return adapter.last_step > self._arena.committed

    # Host

    def may_fetch(self, adapter: Adapter, fetching: int, protect: Collection[int]) -> bool:
        """Whether reading this adapter would find room on the host, with `fetching` others that have none yet."""
        return self._victims(adapter, adapter.pages, protect, fetching) is not None

    def make_host_room(self, adapter: Adapter, pages: int, protect: Collection[int]) -> list[Adapter]:
        """Reserves pages for an adapter and takes others off the host, least recently used first.

        Returns those whose pages the caller must drop; they are cold now. Raises HostFullError when what would have
        to go is in use or in `protect`, EngineError when the adapter can never fit.
        """
        self._refuse_too_large(adapter, pages)
        victims = self._victims(adapter, pages, protect)
        if victims is None:
            raise HostFullError(f"no room on the host for adapter '{adapter.name}': those there are pinned or in use")
        for victim in victims:
            self.demote(victim, "capacity")
        adapter.host_pages = pages
        self._host[adapter.adapter_id] = adapter
        return victims

    def hosted(self, adapter: Adapter, told: Hosted) -> None:
        """The adapter's pages are on the host."""
        assert adapter.host_pages, "no room was made"
        adapter.fetching, adapter.on_host, adapter.keep, adapter.error = False, True, True, None
        adapter.pages = adapter.host_pages = told.pages
        adapter.rank, adapter.modules, adapter.content = told.rank, told.modules, told.content
        self.touch(adapter)

    def rename(self, adapter: Adapter, old_id: int) -> None:
        """The adapter got a new adapter_id while it was on its way to the host."""
        assert old_id not in self._resident
        if self._host.pop(old_id, None):
            self._host[adapter.adapter_id] = adapter

    def unhost(self, adapter: Adapter) -> None:
        """Gives up pages held or reserved."""
        self._host.pop(adapter.adapter_id, None)
        adapter.on_host, adapter.host_pages = False, 0

    def demote(self, adapter: Adapter, reason: str) -> None:
        """Takes an idle adapter off every tier."""
        if adapter.chunks:
            self.evict(adapter, "host")
        self.unhost(adapter)
        self.evictions[f"host/{reason}"] += 1

    # Pins

    def check_pin(self, adapter: Adapter, others: Iterable[Adapter]) -> None:
        """Raises EngineError unless the adapter may be pinned beside those that are."""
        pinned = [other for other in others if other.pinned and other is not adapter]
        if len(pinned) >= self.limits.max_pins:
            raise EngineError(
                ErrorCode.INVALID_REQUEST,
                f"adapter '{adapter.name}' cannot be pinned: at most {self.limits.max_pins} adapters can be"
                " (--max-loras-per-batch less one)",
            )
        self._refuse_pinned_bytes(adapter, pinned)

    def check(self, adapters: Iterable[Adapter]) -> None:
        """Raises AssertionError unless tiers, chunks and orders agree with the adapters' facts."""
        known = {adapter.adapter_id: adapter for adapter in adapters}
        assert self._resident == {i: a for i, a in known.items() if a.chunks}
        assert self._host == {i: a for i, a in known.items() if a.host_pages}
        assert self._idle == {i: a for i, a in known.items() if a.ready and not a.tally.running}
        chunks = [chunk for adapter in self._resident.values() for chunk in adapter.chunks]
        assert len(chunks) == len(set(chunks))
        assert set(chunks) == self._arena.owned(ChunkUse.ADAPTER), "adapters' chunks and the arena's differ"
        for adapter in known.values():
            assert not adapter.chunks or (adapter.on_host and len(adapter.chunks) == adapter.pages)
            assert not (adapter.copying and not adapter.chunks)
            assert not adapter.on_host or adapter.host_pages == adapter.pages
        limit = self.limits.max_loaded
        assert limit is None or len({adapter.name for adapter in self._host.values()}) <= limit

    def _now_idle(self, adapter: Adapter) -> None:
        adapter.idle_since = self._eviction.now
        self._idle[adapter.adapter_id] = adapter
        self._idle.move_to_end(adapter.adapter_id)

    def _evictable(self, adapter: Adapter, protect: Collection[int]) -> bool:
        return not (adapter.pinned or self.in_flight(adapter) or adapter.adapter_id in protect)

    def _victims(
        self, adapter: Adapter, pages: int, protect: Collection[int], fetching: int = 0
    ) -> list[Adapter] | None:
        """Who must leave the host for this adapter, oldest first; None when too few may.

        Versions of one name count once, their pages each.
        """
        others = [other for other in self._host.values() if other is not adapter]
        names = Counter([adapter.name, *(other.name for other in others)])
        count, held = len(names) + fetching, sum(other.host_pages for other in others) + pages
        if not self._exceeds_host(count, held):
            return []
        spare = sorted((o for o in others if self._may_leave_host(o, protect)), key=lambda o: o.touched, reverse=True)
        victims: list[Adapter] = []
        while self._exceeds_host(count, held):
            if not spare:
                return None
            victims.append(spare.pop())
            names[victims[-1].name] -= 1
            count, held = count - (not names[victims[-1].name]), held - victims[-1].host_pages
        return victims

    def _exceeds_host(self, adapters: int, pages: int) -> bool:
        loaded, limit = self.limits.max_loaded, self.limits.max_host_pages
        return (loaded is not None and adapters > loaded) or (limit is not None and pages > limit)

    def _may_leave_host(self, adapter: Adapter, protect: Collection[int]) -> bool:
        in_use = adapter.pinned or adapter.copying or adapter.started or adapter.retired or self.in_flight(adapter)
        return adapter.on_host and not in_use and adapter.adapter_id not in protect

    def _refuse_pinned_bytes(self, adapter: Adapter, pinned: list[Adapter]) -> None:
        """Beside pinned adapters every tier keeps room for the largest one, and the arena for one full context."""
        largest, context = self.limits.max_adapter_chunks, self.limits.context_blocks
        chunks = sum(one.pages or largest for one in [*pinned, adapter])
        if chunks + largest + context > self._arena.num_chunks:
            raise EngineError(
                ErrorCode.INVALID_REQUEST,
                f"adapter '{adapter.name}' cannot be pinned: {chunks} chunks of pinned adapters, {largest} for the"
                f" largest adapter and {context} for one full context are more than the {self._arena.num_chunks}"
                " there are",
            )
        if self.limits.max_host_pages is not None and chunks + largest > self.limits.max_host_pages:
            raise EngineError(
                ErrorCode.INVALID_REQUEST,
                f"adapter '{adapter.name}' cannot be pinned: {chunks} pages of pinned adapters and {largest} for the"
                f" largest adapter are more than the host's {self.limits.max_host_pages}",
            )

    def _refuse_too_large(self, adapter: Adapter, pages: int) -> None:
        limit = self.limits.max_host_pages
        if limit is not None and pages > limit:
            raise EngineError(
                ErrorCode.ADAPTER_INVALID, f"adapter '{adapter.name}' takes {pages} pages, the host tier has {limit}"
            )
        if pages > self.limits.max_adapter_chunks:
            raise EngineError(
                ErrorCode.ADAPTER_INVALID,
                f"adapter '{adapter.name}' takes {pages} chunks, the largest allowed {self.limits.max_adapter_chunks}",
            )

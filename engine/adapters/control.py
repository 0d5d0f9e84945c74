"""Loads, unloads and pins as they pass through catalogue, residency and queue. Called by the loop and its loader.

It decides and accounts; reading sources, host pages and copies to the device are the caller's, told here when done.
"""

from collections.abc import Iterable

from engine.adapters.adapter import Adapter, Hosted
from engine.adapters.catalog import Catalog
from engine.adapters.reasons import public_reason
from engine.adapters.residency import Residency
from engine.blocks import Chain, chain_seed
from engine.messages import RequestFailed
from engine.roster import Roster
from engine.stats import Recorder
from engine.types import AdapterInfo, EngineError, ErrorCode

LOAD_ERROR_SECONDS = 10.0  # a source that failed is not read again for so long, but for who loads or pins


class AdapterControl:
    """Every method is quick and runs on the loop's thread. Those that return `RequestFailed` ended these requests."""

    def __init__(
        self, catalog: Catalog, residency: Residency, roster: Roster, recorder: Recorder,
        *, max_fetches: int, block_tokens: int, chunk_bytes: int, unix_offset: float = 0.0,
    ) -> None:  # fmt: skip
        self.catalog = catalog
        self._residency = residency
        self._roster = roster
        self._recorder = recorder
        self._max_fetches = max_fetches
        self._block_tokens = block_tokens
        self._chunk_bytes = chunk_bytes
        self._unix_offset = unix_offset
        self._copies: dict[int, float] = {}  # adapter_id -> when the copy to the device was planned

    # What is known

    def info(self, name: str) -> AdapterInfo:
        """Raises EngineError for an unknown name."""
        return self._info(self.catalog.named(name))

    def find(self, adapter_id: int) -> AdapterInfo | None:
        """None once it is gone."""
        adapter = self.catalog.find(adapter_id)
        return None if adapter is None else self._info(adapter)

    def current_id(self, name: str) -> int | None:
        """The adapter_id that requests for the name get; None for an unknown name."""
        versions = self.catalog.versions(name)
        return versions[0].adapter_id if versions else None

    def infos(self) -> list[AdapterInfo]:
        return [self._info(adapter) for adapter in self.catalog.listed]

    def wanted(self, adapter: Adapter, now: float) -> None:
        """A request names it. Raises EngineError while the failure of its last load is remembered."""
        if adapter.error is not None and now < adapter.retry_at:
            raise EngineError(
                ErrorCode.ADAPTER_UNAVAILABLE, f"adapter '{adapter.name}' could not be loaded: {adapter.error}"
            )
        adapter.used_at, adapter.error = now, None
        self._recorder.add("adapter_hits" if adapter.ready else "adapter_misses")

    # From the source to the host

    def list_cold(
        self, name: str, source: str, *, revision: str | None = None, pinned: bool = False, weight: float = 1.0,
        now: float = 0.0,
    ) -> AdapterInfo:  # fmt: skip
        """Lists an adapter of --lora-paths that is read when it is named, or at once when it is pinned."""
        adapter = self.catalog.add(name, source, revision=revision, pinned=pinned, weight=weight, now=now)
        if pinned:
            self._check_new_pin(adapter)
        return self._info(adapter)

    def begin_load(
        self, name: str, source: str, *, revision: str | None = None, pinned: bool = False, weight: float = 1.0,
        now: float = 0.0,
    ) -> tuple[AdapterInfo, bool]:  # fmt: skip
        """(the adapter, LOADING; whether the caller is to read it). False: the same load runs already, wait for it.

        Raises EngineError: LoRA is off, the name is taken, too many pins.
        """
        adapter, ours = self.catalog.begin_load(name, source, revision=revision, pinned=pinned, weight=weight, now=now)
        if ours and pinned:
            self._check_new_pin(adapter)
        return self._info(adapter), ours

    def take_fetches(self) -> list[int]:
        """adapter_ids to read from their source now, LOADING from here on until host_done, _failed or _postponed.

        Pinned ones first, then those that waiting sequences want, in queue order, as far as the host can take them.
        """
        absent = self._roster.queue.wanted(self._max_fetches, lambda adapter: not adapter.on_host)
        fetches: list[int] = []
        for adapter in [*self.catalog.pinned, *absent]:
            if adapter.fetchable and self._may_fetch(adapter):
                adapter.fetching = True
                fetches.append(adapter.adapter_id)
        return fetches

    def make_host_room(self, adapter_id: int, pages: int) -> list[int]:
        """Reserves host pages for an adapter being read; the adapter_ids whose pages the caller must drop.

        Raises HostFullError when there is no room now (postpone a fetch, fail a load), EngineError when there never
        is or the pin is against the rules.
        """
        adapter = self.catalog.get(adapter_id)
        adapter.pages = pages
        if adapter.pinned:
            self._residency.check_pin(adapter, self.catalog)
        victims = self._residency.make_host_room(adapter, pages, self._roster.queue.wanted_before(adapter))
        return [victim.adapter_id for victim in victims]

    def host_done(self, adapter_id: int, hosted: Hosted) -> int:
        """The adapter's pages are filled. Returns its adapter_id from now on: a fresh one if its source changed."""
        adapter = self.catalog.get(adapter_id)
        if adapter.content not in (None, hosted.content):
            self._renew(adapter)
        self._residency.hosted(adapter, hosted)
        return adapter.adapter_id

    def host_failed(self, adapter_id: int, reason: str, now: float) -> list[RequestFailed]:
        """Reading failed. A first load leaves no trace, nor does one in place.

        An adapter known before is FAILED and not pinned; it is read again when it is named LOAD_ERROR_SECONDS later.
        """
        adapter = self.catalog.get(adapter_id)
        adapter.fetching, adapter.pinned = False, False
        adapter.error, adapter.retry_at = public_reason(reason, adapter.source), now + LOAD_ERROR_SECONDS
        self._residency.unhost(adapter)
        failed = self._fail_requests(adapter, f"adapter '{adapter.name}' could not be loaded: {adapter.error}")
        if adapter.arriving or not (adapter.keep or adapter.leaving):
            self.catalog.remove(adapter)
        return failed

    def host_postponed(self, adapter_id: int) -> None:
        """A fetch met a full host: it is fetched again when something may leave."""
        adapter = self.catalog.get(adapter_id)
        adapter.fetching = False
        self._residency.unhost(adapter)

    # From the host to the arena

    def take_evicted(self) -> list[int]:
        """adapter_ids that left the arena: the worker forgets them before it gets the plan that was made last."""
        return self._residency.take_evicted()

    def copy_planned(self, adapter_ids: Iterable[int], now: float) -> None:
        """A plan carries these loads."""
        self._copies.update((adapter_id, now) for adapter_id in adapter_ids)

    def load_done(self, adapter_id: int, now: float) -> None:
        """The copy into the arena has finished: the adapter is RESIDENT."""
        self._residency.placed(self.catalog.get(adapter_id))
        self._recorder.load("device", "ok", now - self._copies.pop(adapter_id))

    def load_failed(self, adapter_id: int, reason: str, now: float) -> list[RequestFailed]:
        """The copy failed: its chunks are free again, it is not pinned, and it is copied anew when named."""
        adapter = self.catalog.get(adapter_id)
        self._recorder.load("device", "failed", now - self._copies.pop(adapter_id))
        self._residency.evict(adapter, "failed")
        adapter.error, adapter.pinned, adapter.retry_at = reason, False, now
        return self._fail_requests(adapter, f"adapter '{adapter.name}' could not be copied to the device: {reason}")

    # Loads in place

    def begin_replace(
        self, name: str, source: str, *, revision: str | None, pinned: bool | None, weight: float | None, now: float
    ) -> AdapterInfo:
        """A new version of a loaded name, to be read by the caller. Raises EngineError: see the catalogue; pins."""
        old = self.catalog.named(name)
        weight = old.weight if weight is None else weight
        adapter = self.catalog.begin_replace(name, source, revision=revision, weight=weight, now=now)
        if pinned:
            self._check_new_pin(adapter, replaces=old)
        return self._info(adapter)

    def same_content(self, adapter_id: int, content: str, pinned: bool | None) -> int | None:
        """The adapter_id that the name has, where it stands for this very content and it is on the host.

        The arriving version is gone then; its source, weight and pin are the name's. None: it is to be stored.
        """
        adapter = self.catalog.get(adapter_id)
        current = self.catalog.named(adapter.name)
        if adapter.draining or not current.on_host or current.content != content:
            return None
        pinned = current.pinned if pinned is None else pinned
        if pinned:
            self._residency.check_pin(current, self.catalog)
        current.source, current.revision, current.weight = adapter.source, adapter.revision, adapter.weight
        current.pinned, current.error = pinned, None
        self.catalog.remove(adapter)
        return current.adapter_id

    def take_over(self, adapter_id: int, pinned: bool | None) -> int:
        """Requests get the version that was stored from now on; returns the adapter_id of the one before.

        Raises EngineError, with the old version untouched: the name is being unloaded, or the pin is refused.
        """
        adapter = self.catalog.get(adapter_id)
        old = self.catalog.named(adapter.name)
        if adapter.draining:
            raise gone_while_loading(adapter.name)
        pinned = old.pinned if pinned is None else pinned
        if pinned:
            self._residency.check_pin(adapter, self._others(old))
        self.catalog.take_over(adapter)
        adapter.pinned = pinned
        self._recorder.add("adapters_replaced")
        return old.adapter_id

    def give_up(self, adapter_id: int) -> None:
        """An arriving version is not wanted or not to be had; the caller drops its host pages."""
        if (adapter := self.catalog.find(adapter_id)) is not None:
            self._residency.unhost(adapter)
            self.catalog.remove(adapter)

    def finish_retired(self) -> list[AdapterInfo]:
        """Frees the retired versions that nothing refers to; the caller drops the host pages of these."""
        drained = [adapter for adapter in self.catalog.retired if self._unused(adapter)]
        for adapter in drained:
            self._free(adapter, "replaced")
        return [self._info(adapter) for adapter in drained]

    # Unloads

    def begin_unload(self, name: str) -> int:
        """DRAINING: new requests are refused, accepted ones end. Raises EngineError for an unknown name."""
        return self.catalog.begin_unload(name).adapter_id

    def drained(self, name: str) -> bool:
        """Whether nothing refers to the adapter any more: no sequence, load, copy, uncommitted step or old version."""
        return all(self._unused(adapter) and not adapter.retired for adapter in self.catalog.versions(name))

    def unwanted_reads(self, draining: Iterable[str]) -> list[int]:
        """adapter_ids that are read though nobody will use them: of the names being unloaded, or retired."""
        versions = [adapter for name in draining for adapter in self.catalog.versions(name)]
        return [a.adapter_id for a in [*versions, *self.catalog.retired] if a.fetching and not a.open]

    def fail_requests(self, name: str, reason: str) -> list[RequestFailed]:
        """Ends what still uses the adapter, for a drain that timed out."""
        return [failed for adapter in self.catalog.versions(name) for failed in self._fail_requests(adapter, reason)]

    def finish_unload(self, name: str) -> int:
        """Frees a drained adapter on every tier; the caller drops the host pages of the adapter_id returned."""
        assert self.drained(name)
        adapter = self.catalog.named(name)
        self._free(adapter, "unload")
        self._recorder.add("drains")
        return adapter.adapter_id

    # Pins

    def pin(self, name: str) -> AdapterInfo:
        """It gets chunks as soon as possible and keeps them; a load that failed is tried again.

        Raises EngineError: too many pins, or too large ones.
        """
        adapter = self.catalog.named(name)
        if adapter.draining:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' is being unloaded")
        self._residency.check_pin(adapter, self.catalog)
        adapter.pinned, adapter.error = True, None
        return self._info(adapter)

    def unpin(self, name: str) -> AdapterInfo:
        adapter = self.catalog.named(name)
        adapter.pinned = False
        return self._info(adapter)

    def _info(self, adapter: Adapter) -> AdapterInfo:
        return adapter.info(self._chunk_bytes, self._unix_offset)

    def _check_new_pin(self, adapter: Adapter, replaces: Adapter | None = None) -> None:
        try:
            self._residency.check_pin(adapter, self._others(replaces))
        except EngineError:
            self.catalog.remove(adapter)
            raise

    def _others(self, replaced: Adapter | None) -> list[Adapter]:
        return [adapter for adapter in self.catalog if adapter is not replaced]

    def _unused(self, adapter: Adapter) -> bool:
        return not (adapter.open or adapter.fetching or adapter.copying or self._residency.in_flight(adapter))

    def _free(self, adapter: Adapter, reason: str) -> None:
        if adapter.chunks:
            self._residency.evict(adapter, reason)
        self._residency.unhost(adapter)
        self.catalog.remove(adapter)

    def _may_fetch(self, adapter: Adapter) -> bool:
        unplaced = sum(other.fetching and not other.host_pages for other in self.catalog)
        return self._residency.may_fetch(adapter, unplaced, self._roster.queue.wanted_before(adapter))

    def _renew(self, adapter: Adapter) -> None:
        old = adapter.adapter_id
        self.catalog.renew(adapter)
        self._residency.rename(adapter, old)
        for sequence in self._roster.sequences(adapter):
            assert not sequence.started, "an adapter changed under a sequence"
            seed = chain_seed(adapter.adapter_id, sequence.request.submit.salt)
            sequence.chain = Chain(seed, self._block_tokens)

    def _fail_requests(self, adapter: Adapter, message: str) -> list[RequestFailed]:
        requests = [request for request in self._roster.requests.values() if request.adapter is adapter]
        self._recorder.add("failed", len(requests))
        return [
            RequestFailed(request_id=request_id, code=ErrorCode.ADAPTER_UNAVAILABLE, message=message)
            for request_id in self._roster.end_requests(requests)
        ]


def gone_while_loading(name: str) -> EngineError:
    """What a load is told that an unload overtook."""
    return EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' was unloaded while it was being loaded")

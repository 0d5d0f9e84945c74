"""Carries out what adapters need: loads, fetches, copies to the device, pins, drains. Called by the engine's loop.

Decisions are AdapterControl's; whatever blocks (files, the hub, filling pages) runs in threads, never on the loop.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.adapters.control import AdapterControl, gone_while_loading
from engine.adapters.host import HostAdapter, HostTier
from engine.adapters.hub import Hub
from engine.adapters.intake import AdapterReader, Intake, foreseen
from engine.adapters.loads import Loads, Wanted
from engine.adapters.residency import HostFullError
from engine.adapters.snapshot import RepositoryMissing
from engine.adapters.start import Start
from engine.config import LoraPath
from engine.messages import AdapterRemoved, AdapterUpdated, Event, RequestFailed
from engine.plan import AdapterLoad
from engine.stats import Recorder
from engine.types import AdapterInfo, AdapterState, EngineError, ErrorCode


class Device(Protocol):
    """The part of the worker that holds adapters."""

    def load(
        self, load: AdapterLoad, adapter: HostAdapter, done: Callable[[int, BaseException | None], None]
    ) -> None: ...

    def drop(self, adapter_id: int) -> None: ...


@dataclass(slots=True)
class Drain:
    """An unload under way."""

    drained: asyncio.Event = field(default_factory=asyncio.Event)  # nothing uses the adapter any more
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # it is freed


class AdapterLoader:
    """`post` sends an event to the gateway; `wake` makes the loop plan again."""

    def __init__(
        self, control: AdapterControl, host: HostTier, device: Device, reader: AdapterReader, recorder: Recorder,
        post: Callable[[Event], None], wake: asyncio.Event, hub: Hub | None = None,
    ) -> None:  # fmt: skip
        self._control = control
        self._host = host
        self._device = device
        self._post = post
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._intake = Intake(control, host, reader, recorder, self._announce, hub)
        self._loads = Loads(control, self._intake, self._fail, self._replaced, self._lost, self._changed)
        self._arrivals: dict[int, list[asyncio.Future[None]]] = {}  # who waits until an adapter is resident
        self._drains: dict[str, Drain] = {}  # by name
        self._tasks: set[asyncio.Task[None]] = set()

    # Calls

    async def start(self, paths: Sequence[LoraPath], max_loaded: int | None, restored: Sequence[LoraPath] = ()) -> None:
        """Loads --lora-paths in their order, then what was served before.

        Those beyond `max_loaded` are checked and listed; pinned and preloaded ones load always. Raises EngineError
        naming the path where one of --lora-paths fails; of what was served before the reason is kept.
        """
        await Start(self._control, self._intake, self._loads).run(paths, max_loaded, restored)

    async def offer(self, name: str, source: str) -> AdapterInfo:
        """Lists an adapter that is read when a request comes for it; a hub repository is fetched first.

        Raises EngineError: ADAPTER_NOT_FOUND where the hub has none such, ADAPTER_UNAVAILABLE where it fails.
        """
        self._intake.check_name(name)
        try:
            await self._intake.fetched(source)
        except RepositoryMissing as error:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, error.message) from error
        except EngineError as error:
            raise EngineError(ErrorCode.ADAPTER_UNAVAILABLE, error.message) from error
        if self._control.current_id(name) is None:
            self._announce(self._control.list_cold(name, source, now=self._loop.time()).adapter_id)
        return self._control.info(name)

    async def load(self, wanted: Wanted, *, inplace: bool = False, timeout: float | None = None) -> AdapterInfo:
        """Returns when the adapter is on the host, a pinned one in the arena. Raises EngineError with the reason.

        `inplace`: a loaded name gets these weights. `timeout` is in seconds.
        """
        self._intake.check_name(wanted.name)
        deadline = None if timeout is None else self._loop.time() + timeout
        adapter_id = await (self._loads.in_place if inplace else self._loads.first)(wanted, deadline)
        self._announce(adapter_id)
        info = self._control.find(adapter_id)
        if info is not None and info.pinned:
            await self._pinned_in_time(adapter_id, deadline)
        return self._control.info(wanted.name)

    async def unload(self, name: str, timeout: float, *, force: bool = False) -> None:
        """Returns when the adapter is gone from every tier.

        What uses it is ended after `timeout` seconds, with `force` at once: also where another unload waits for it.
        """
        if force and (other := self._drains.get(name)) is not None:
            self._end_users(name)
            await other.gone.wait()
            return
        self._announce(self._control.begin_unload(name))
        drain = self._drains[name] = Drain()
        try:
            await self._drain(name, drain, 0.0 if force else timeout)
            self._forget(name)
        finally:
            del self._drains[name]
            drain.gone.set()

    async def _drain(self, name: str, drain: Drain, timeout: float) -> None:
        self.settle()
        if timeout <= 0:
            self._end_users(name)
        try:
            async with asyncio.timeout(timeout or None):
                await drain.drained.wait()
        except TimeoutError:
            self._end_users(name)
            await drain.drained.wait()

    async def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Pinning returns when the adapter is in the arena."""
        info = self._control.pin(name) if pinned else self._control.unpin(name)
        self._announce(info.adapter_id)
        self._wake.set()
        if pinned:
            await self._resident(info.adapter_id)
        else:  # it may not come to the arena now, so nobody waits for that
            self._arrived(info.adapter_id, EngineError(ErrorCode.ADAPTER_UNAVAILABLE, f"'{name}' was unpinned"))
        return self._control.info(name)

    # What plans want

    def fetch(self, adapter_id: int) -> None:
        """Brings an adapter that a waiting sequence wants from its source to the host, beside the loop."""
        task = asyncio.create_task(self._fetch(adapter_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def to_device(self, load: AdapterLoad) -> None:
        """Starts the copy that a plan carries."""
        adapter = self._host.get(load.adapter_id)
        assert adapter is not None, "a plan loads an adapter that is not on the host"
        self._device.load(load, adapter, self._copied_elsewhere)

    def dropped(self, adapter_ids: Iterable[int]) -> None:
        """These left the arena: the worker forgets them before their chunks are used again."""
        for adapter_id in adapter_ids:
            self._device.drop(adapter_id)

    def settle(self) -> None:
        """Something ended: gives up reads for nobody, frees what was replaced, tells the drains that wait for it."""
        for adapter_id in self._control.unwanted_reads(self._drains):
            info = self._control.find(adapter_id)
            assert info is not None
            self._intake.abandon(adapter_id, gone_while_loading(info.name))
        for retired in self._control.finish_retired():
            self._intake.drop(retired.adapter_id)
            self._post(AdapterRemoved(name=retired.name, adapter_id=retired.adapter_id))
        for name, drain in self._drains.items():
            if self._control.drained(name):
                drain.drained.set()

    def close(self) -> None:
        """Ends what runs; threads that read go on until their file is read."""
        self._loads.close()
        self._intake.close()
        for task in self._tasks:
            task.cancel()

    # From source to host

    async def _fetch(self, adapter_id: int) -> None:
        info = self._control.find(adapter_id)
        assert info is not None, "an adapter is not removed while it is fetched"
        try:
            file = await self._intake.read(adapter_id, info.source, info.revision, again=False)
            renewed = await self._intake.store(adapter_id, file)
        except HostFullError:
            self._control.host_postponed(adapter_id)
        except Exception as error:
            reason = foreseen(error)
            self._fail(self._control.host_failed(adapter_id, reason.message, self._loop.time()))
            self._arrived(adapter_id, reason)
            self._announce(adapter_id)
        else:
            if renewed != adapter_id:
                self._post(AdapterRemoved(name=info.name, adapter_id=adapter_id))
                self._arrive_as(adapter_id, renewed)
            self._announce(renewed)
        self._changed()

    # From host to arena

    def _copied_elsewhere(self, adapter_id: int, error: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._copied, adapter_id, error)

    def _copied(self, adapter_id: int, error: BaseException | None) -> None:
        if error is None:
            self._control.load_done(adapter_id, self._loop.time())
        else:
            self._fail(self._control.load_failed(adapter_id, str(error), self._loop.time()))
            self._announce(adapter_id)
        self._arrived(adapter_id, None if error is None else foreseen(error))
        self._changed()

    async def _pinned_in_time(self, adapter_id: int, deadline: float | None) -> None:
        """`_resident`, but at the deadline the adapter stays where it is and is not pinned."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._resident(adapter_id)
        except TimeoutError:
            info = self._control.find(adapter_id)
            name = "" if info is None else info.name
            if self._control.current_id(name) == adapter_id:
                self._control.unpin(name)
                self._announce(adapter_id)
            raise EngineError(
                ErrorCode.ADAPTER_UNAVAILABLE,
                f"adapter '{name}' is loaded, but came not to the arena within the given time: it is not pinned",
            ) from None

    async def _resident(self, adapter_id: int) -> None:
        """Returns when the adapter is in the arena; raises EngineError when a load of it fails."""
        info = self._control.find(adapter_id)
        if info is None or info.state is AdapterState.RESIDENT:
            return
        arrival: asyncio.Future[None] = self._loop.create_future()
        self._arrivals.setdefault(adapter_id, []).append(arrival)
        self._wake.set()
        await arrival

    def _arrived(self, adapter_id: int, error: EngineError | None) -> None:
        for arrival in self._arrivals.pop(adapter_id, []):
            if arrival.done():
                continue
            if error is None:
                arrival.set_result(None)
            else:
                arrival.set_exception(error)

    def _arrive_as(self, adapter_id: int, renewed: int) -> None:
        """Who waits for the first waits for the second now."""
        if waiting := self._arrivals.pop(adapter_id, []):
            self._arrivals.setdefault(renewed, []).extend(waiting)

    # Telling

    def _replaced(self, old: int, new: int) -> None:
        self._arrive_as(old, new)
        self._announce(new)
        if (info := self._control.find(new)) is not None and not info.pinned:
            unpinned = EngineError(ErrorCode.ADAPTER_UNAVAILABLE, f"'{info.name}' was replaced and is not pinned")
            self._arrived(new, unpinned)

    def _lost(self, name: str, adapter_id: int, reason: EngineError) -> None:
        """It may have been announced, and somebody may wait for its arrival."""
        self._arrived(adapter_id, reason)
        self._post(AdapterRemoved(name=name, adapter_id=adapter_id))

    def _end_users(self, name: str) -> None:
        self._fail(self._control.fail_requests(name, f"adapter '{name}' was unloaded"))

    def _forget(self, name: str) -> None:
        adapter_id = self._control.finish_unload(name)
        self._intake.drop(adapter_id)
        self._arrived(adapter_id, EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' was unloaded"))
        self._post(AdapterRemoved(name=name, adapter_id=adapter_id))
        self._changed()

    def _announce(self, adapter_id: int) -> None:
        """Of a version that was replaced, or is to take over, nothing is told."""
        info = self._control.find(adapter_id)
        if info is not None and self._control.current_id(info.name) == adapter_id:
            self._post(AdapterUpdated(adapter=info))

    def _fail(self, failures: list[RequestFailed]) -> None:
        for failure in failures:
            self._post(failure)
        self._changed()

    def _changed(self) -> None:
        self.settle()
        self._wake.set()

"""Carries out what adapters need: reads sources, fills host pages, starts copies, drains. Called by the engine's loop.

Decisions are AdapterControl's; whatever blocks (files, the hub, filling pages) runs in threads, never on the loop.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from engine.adapters.catalog import Hosted
from engine.adapters.control import AdapterControl
from engine.adapters.host import HostAdapter, HostTier
from engine.adapters.names import check_adapter_name
from engine.adapters.peft import AdapterFile, read_adapter
from engine.adapters.residency import HostFullError
from engine.adapters.source import resolve_source
from engine.adapters.spec import AdapterLimits
from engine.config import LoraPath
from engine.messages import AdapterRemoved, AdapterUpdated, Event, RequestFailed
from engine.models.dims import ModelDims
from engine.plan import AdapterLoad
from engine.stats import Recorder
from engine.types import AdapterInfo, AdapterState, EngineError, ErrorCode

P = ParamSpec("P")
T = TypeVar("T")


class Device(Protocol):
    """The part of the worker that holds adapters."""

    def load(
        self, load: AdapterLoad, adapter: HostAdapter, done: Callable[[int, BaseException | None], None]
    ) -> None: ...

    def drop(self, adapter_id: int) -> None: ...


class AdapterReader:
    """From a source to an AdapterFile; blocking."""

    def __init__(self, dims: ModelDims, limits: AdapterLimits, base: str) -> None:
        self._dims = dims
        self._limits = limits
        self._base = base

    def check_name(self, name: str) -> None:
        """Raises EngineError for a name that no adapter may bear."""
        check_adapter_name(name, self._base)

    def read(self, source: str, revision: str | None) -> AdapterFile:
        """Raises EngineError with the reason."""
        return read_adapter(Path(resolve_source(source, revision)), self._dims, self._limits)


class AdapterLoader:
    """`post` sends an event to the gateway; `wake` makes the loop plan again."""

    def __init__(
        self, control: AdapterControl, host: HostTier, device: Device, reader: AdapterReader, recorder: Recorder,
        post: Callable[[Event], None], wake: asyncio.Event,
    ) -> None:  # fmt: skip
        self._control = control
        self._host = host
        self._device = device
        self._reader = reader
        self._recorder = recorder
        self._post = post
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._loads: dict[int, asyncio.Future[None]] = {}  # first loads that run, by adapter_id
        self._arrivals: dict[int, list[asyncio.Future[None]]] = {}  # who waits until an adapter is resident
        self._drains: dict[str, asyncio.Event] = {}  # unloads under way, by name
        self._tasks: set[asyncio.Task[None]] = set()

    # Calls

    async def start(self, paths: Sequence[LoraPath], max_loaded: int | None) -> None:
        """Loads --lora-paths in their order. Those beyond `max_loaded` are checked and listed; pinned ones load always.

        Raises EngineError naming the path.
        """
        pinned = sum(path.pinned for path in paths)
        room = len(paths) if max_loaded is None else max_loaded - pinned
        for path in paths:
            loads = path.pinned or room > 0
            room -= loads and not path.pinned
            try:
                await self._start_one(path, loads)
            except EngineError as error:
                raise EngineError(error.code, f"--lora-paths {path.name}={path.path}: {error.message}") from error

    async def _start_one(self, path: LoraPath, loads: bool) -> None:
        self._reader.check_name(path.name)
        if loads:
            await self._load(path.name, path.path, path.pinned, path.revision, path.weight)
            return
        await asyncio.to_thread(self._reader.read, path.path, path.revision)
        self._control.list_cold(path.name, path.path, revision=path.revision, weight=path.weight, now=self._loop.time())

    async def load(
        self, name: str, source: str, pinned: bool, revision: str | None, weight: float = 1.0
    ) -> AdapterInfo:
        """Returns when the adapter is on the host, a pinned one in the arena. Raises EngineError with the reason."""
        self._reader.check_name(name)
        adapter_id = await self._load(name, source, pinned, revision, weight)
        self._announce(adapter_id)
        if pinned:
            await self._resident(adapter_id)
        return self._control.info(name)

    async def unload(self, name: str, timeout: float) -> None:
        """Returns when the adapter is gone from every tier."""
        adapter_id = self._control.begin_unload(name)
        self._announce(adapter_id)
        drained = self._drains[name] = asyncio.Event()
        try:
            self.settle()
            try:
                await asyncio.wait_for(drained.wait(), timeout)
            except TimeoutError:
                self._fail(self._control.fail_requests(name, f"adapter '{name}' was unloaded"))
                await drained.wait()
        finally:
            del self._drains[name]
        self._forget(name)

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
        """Something ended: tells the drains that wait for it."""
        for name, drained in self._drains.items():
            if self._control.drained(name):
                drained.set()

    def close(self) -> None:
        """Ends what runs; threads that read go on until their file is read."""
        for task in self._tasks:
            task.cancel()

    # From source to host

    async def _load(self, name: str, source: str, pinned: bool, revision: str | None, weight: float) -> int:
        """The adapter_id of a first load, ours or the identical one that runs already."""
        info, ours = self._control.begin_load(
            name, source, revision=revision, pinned=pinned, weight=weight, now=self._loop.time()
        )
        adapter_id = info.adapter_id
        if not ours:
            await asyncio.shield(self._loads[adapter_id])
            return adapter_id
        done = self._loads[adapter_id] = self._loop.create_future()
        try:
            await self._to_host(adapter_id, source, revision)
            done.set_result(None)
        except asyncio.CancelledError:  # the engine stops
            done.cancel()
            raise
        except Exception as error:
            reason = error if isinstance(error, EngineError) else _unforeseen(error)
            self._fail(self._control.host_failed(adapter_id, reason.message))
            done.set_exception(reason)
            done.exception()  # nobody else may be waiting
            raise reason from error
        finally:
            del self._loads[adapter_id]
        return adapter_id

    async def _fetch(self, adapter_id: int) -> None:
        info = self._control.find(adapter_id)
        assert info is not None, "an adapter is not removed while it is fetched"
        try:
            renewed = await self._to_host(adapter_id, info.source, info.revision)
        except HostFullError:
            self._control.host_postponed(adapter_id)
        except Exception as error:
            reason = error if isinstance(error, EngineError) else _unforeseen(error)
            self._fail(self._control.host_failed(adapter_id, reason.message))
            self._arrived(adapter_id, reason)
            self._announce(adapter_id)
        else:
            if renewed != adapter_id:
                self._post(AdapterRemoved(name=info.name, adapter_id=adapter_id))
                self._arrivals[renewed] = self._arrivals.pop(adapter_id, [])
            self._announce(renewed)
        self._changed()

    async def _to_host(self, adapter_id: int, source: str, revision: str | None) -> int:
        """Returns the adapter_id it has from now on."""
        file = await self._timed("source", self._reader.read, source, revision)
        pages = self._host.layout(file.spec).chunks
        for victim in self._control.make_host_room(adapter_id, pages):
            self._host.drop(victim)
        await self._timed("host", self._host.store, adapter_id, file)
        spec = file.spec
        hosted = Hosted(pages=pages, rank=spec.rank, modules=spec.module_names, content=spec.content_hash)
        renewed = self._control.host_done(adapter_id, hosted)
        if renewed != adapter_id:
            self._host.rename(adapter_id, renewed)
        self._changed()
        return renewed

    async def _timed(self, stage: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        start = self._loop.time()
        outcome = "failed"
        try:
            result = await asyncio.to_thread(work, *args, **kwargs)
            outcome = "ok"
            return result
        finally:
            self._recorder.load(stage, outcome, self._loop.time() - start)

    # From host to arena

    def _copied_elsewhere(self, adapter_id: int, error: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._copied, adapter_id, error)

    def _copied(self, adapter_id: int, error: BaseException | None) -> None:
        if error is None:
            self._control.load_done(adapter_id, self._loop.time())
        else:
            self._fail(self._control.load_failed(adapter_id, str(error), self._loop.time()))
        self._arrived(adapter_id, None if error is None else _unforeseen(error))
        self._changed()

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

    # Telling

    def _forget(self, name: str) -> None:
        adapter_id = self._control.finish_unload(name)
        if self._host.get(adapter_id) is not None:
            self._host.drop(adapter_id)
        self._arrived(adapter_id, EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' was unloaded"))
        self._post(AdapterRemoved(name=name, adapter_id=adapter_id))
        self._changed()

    def _announce(self, adapter_id: int) -> None:
        if (info := self._control.find(adapter_id)) is not None:
            self._post(AdapterUpdated(adapter=info))

    def _fail(self, failures: list[RequestFailed]) -> None:
        for failure in failures:
            self._post(failure)
        self._changed()

    def _changed(self) -> None:
        self.settle()
        self._wake.set()


def _unforeseen(error: BaseException) -> EngineError:
    return EngineError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")

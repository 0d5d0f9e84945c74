"""Adapters on their way from a source to the host. Called by the loader, and by the loads that it serves.

Whatever blocks runs in threads. A read can be given up: nobody waits for its thread then, and its result is dropped.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.adapters.adapter import Hosted
from engine.adapters.control import AdapterControl
from engine.adapters.host import HostTier
from engine.adapters.hub import Hub
from engine.adapters.names import check_adapter_name
from engine.adapters.pages import ReusedPages
from engine.adapters.peft import AdapterFile, read_adapter
from engine.adapters.source import refuse_outside, resolve_source
from engine.adapters.spec import AdapterLimits
from engine.models.dims import ModelDims
from engine.stats import Recorder
from engine.types import EngineError, ErrorCode
from engine.worker.background import lower_priority
from engine.worker.breaks import Breaks

READERS = 2  # files are read and stored by so many threads of low priority: more would only take the step's cores
T = TypeVar("T")


class AdapterReader:
    """From a source to an AdapterFile; blocking."""

    def __init__(
        self, dims: ModelDims, limits: AdapterLimits, base: str, breaks: Breaks, inside: Path | None = None
    ) -> None:
        """`inside`: from adapters in this folder no link may lead out of it."""
        self._dims = dims
        self._limits = limits
        self._base = base
        self._breaks = breaks
        self._inside = inside
        self._pages = ReusedPages()

    def check_name(self, name: str) -> None:
        """Raises EngineError for a name that no adapter may bear."""
        check_adapter_name(name, self._base)

    def read(self, source: str, revision: str | None) -> AdapterFile:
        """Raises EngineError with the reason."""
        return self._breaks.work(lambda: self._read(source, revision))

    def _read(self, source: str, revision: str | None) -> AdapterFile:
        folder = resolve_source(source, revision)
        if self._inside is not None and Path(source).is_relative_to(self._inside):
            refuse_outside(folder, self._inside)
        return read_adapter(folder, self._dims, self._limits, self._breaks.turn, self._pages)


class Intake:
    """Reads and stores; decisions are AdapterControl's."""

    def __init__(
        self, control: AdapterControl, host: HostTier, reader: AdapterReader, recorder: Recorder,
        demoted: Callable[[int], None], hub: Hub | None = None,
    ) -> None:  # fmt: skip
        """`demoted` is told of adapter_ids that left the host; without `hub` the reader asks it itself."""
        self._control = control
        self._host = host
        self._reader = reader
        self._recorder = recorder
        self._demoted = demoted
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-reads", initializer=lower_priority)
        self._reads: set[asyncio.Future[AdapterFile]] = set()  # also those that were given up
        self._stops: dict[int, asyncio.Future[EngineError]] = {}  # by adapter_id: set, its read is given up

    def check_name(self, name: str) -> None:
        """Raises EngineError for a name that no adapter may bear."""
        self._reader.check_name(name)

    async def check(self, source: str, revision: str | None) -> None:
        """Reads a source for its faults alone; raises EngineError."""
        await self._read(source, revision, again=False)

    async def fetched(self, source: str) -> None:
        """Returns when a source's files are on this machine. Raises EngineError."""
        if self._hub is not None:
            await self._hub.resolve(source, None, again=True)

    async def read(self, adapter_id: int, source: str, revision: str | None, *, again: bool = True) -> AdapterFile:
        """`again`: what was fetched from the hub before is not enough.

        Raises EngineError: the reason why it cannot be had, or what `abandon` was given.
        """
        read = asyncio.ensure_future(self._timed("source", self._read(source, revision, again=again)))
        self._reads.add(read)
        read.add_done_callback(self._read_ended)
        stop = self._stops[adapter_id] = self._loop.create_future()
        try:
            await asyncio.wait((read, stop), return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                raise stop.result()
            return read.result()
        finally:
            del self._stops[adapter_id]

    def abandon(self, adapter_id: int, error: EngineError) -> None:
        """Gives up the read of this adapter, if it is being read; who waits for it gets `error`."""
        stop = self._stops.get(adapter_id)
        if stop is not None and not stop.done():
            stop.set_result(error)

    async def store(self, adapter_id: int, file: AdapterFile) -> int:
        """Puts what was read on the host; returns the adapter_id it has from now on.

        Raises HostFullError where nothing can go now, EngineError where it never fits.
        """
        spec = file.spec
        pages = self._host.layout(spec).chunks
        for victim in self._control.make_host_room(adapter_id, pages):
            self._host.drop(victim)
            self._demoted(victim)
        await self._timed("host", self._in_thread(partial(self._host.store, adapter_id, file)))
        hosted = Hosted(pages=pages, rank=spec.rank, modules=spec.module_names, content=spec.content_hash)
        renewed = self._control.host_done(adapter_id, hosted)
        if renewed != adapter_id:
            self._host.rename(adapter_id, renewed)
        return renewed

    def drop(self, adapter_id: int) -> None:
        """Frees its host pages, if it has any."""
        if self._host.get(adapter_id) is not None:
            self._host.drop(adapter_id)

    def close(self) -> None:
        """Waits for no read; threads go on until their file is read."""
        for read in self._reads:
            read.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_ended(self, read: "asyncio.Future[AdapterFile]") -> None:
        self._reads.discard(read)
        if not read.cancelled():
            read.exception()  # of one that was given up nobody asks

    async def _read(self, source: str, revision: str | None, *, again: bool) -> AdapterFile:
        if self._hub is not None:
            folder = await self._hub.resolve(source, revision, again=again)
            source, revision = folder, (revision if folder == source else None)
        return await self._in_thread(partial(self._reader.read, source, revision))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._threads, work)

    async def _timed(self, stage: str, work: Coroutine[Any, Any, T]) -> T:
        start = self._loop.time()
        outcome = "failed"
        try:
            result = await work
            outcome = "ok"
            return result
        finally:
            self._recorder.load(stage, outcome, self._loop.time() - start)


def foreseen(error: BaseException) -> EngineError:
    """The error itself where it is a refusal of ours, else one that names it; clients read it, so no path is in it."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return EngineError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error.strerror}")
    return EngineError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")

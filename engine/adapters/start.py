"""What an engine loads before it is ready: --lora-paths, and what was served before. Called by the loader, once."""

import asyncio
import logging
from collections.abc import Sequence

from engine.adapters.control import AdapterControl
from engine.adapters.intake import Intake, foreseen
from engine.adapters.loads import Loads, Wanted
from engine.adapters.residency import HostFullError
from engine.config import LoraPath
from engine.types import AdapterInfo, EngineError

log = logging.getLogger(__name__)


class Start:
    """Nothing else runs meanwhile."""

    def __init__(self, control: AdapterControl, intake: Intake, loads: Loads) -> None:
        self._control = control
        self._intake = intake
        self._loads = loads
        self._now = asyncio.get_running_loop().time

    async def run(self, paths: Sequence[LoraPath], max_loaded: int | None, restored: Sequence[LoraPath]) -> None:
        """See AdapterLoader.start."""
        both = [*paths, *restored]
        first = sum(path.pinned or path.preload for path in both)
        room = len(both) if max_loaded is None else max_loaded - first
        for i, path in enumerate(both):
            is_first = path.pinned or path.preload
            loads = is_first or room > 0
            room -= loads and not is_first
            await (self._start_one if i < len(paths) else self._restore_one)(path, loads)

    async def _start_one(self, path: LoraPath, loads: bool) -> None:
        try:
            await self._load_or_check(path, loads)
        except EngineError as error:
            raise EngineError(error.code, f"--lora-paths {path.name}={path.path}: {error.message}") from error

    async def _load_or_check(self, path: LoraPath, loads: bool) -> None:
        self._intake.check_name(path.name)
        if loads:
            wanted = Wanted(
                name=path.name, source=path.path, revision=path.revision, pinned=path.pinned, weight=path.weight
            )
            await self._loads.first(wanted)
            return
        await self._intake.check(path.path, path.revision)
        self._control.list_cold(path.name, path.path, revision=path.revision, weight=path.weight, now=self._now())

    async def _restore_one(self, path: LoraPath, loads: bool) -> None:
        adapter_id = self._list_restored(path).adapter_id
        try:
            file = await self._intake.read(adapter_id, path.path, path.revision, again=False)
            if loads:
                await self._intake.store(adapter_id, file)
        except HostFullError:
            self._control.host_postponed(adapter_id)
        except Exception as error:
            reason = foreseen(error).message
            log.error("adapter %r cannot be loaded again: %s", path.name, reason)
            self._control.host_failed(adapter_id, reason, self._now())

    def _list_restored(self, path: LoraPath) -> AdapterInfo:
        """Pinned where that is still allowed."""
        now = self._now()
        try:
            return self._control.list_cold(
                path.name, path.path, revision=path.revision, pinned=path.pinned, weight=path.weight, now=now
            )
        except EngineError as error:
            log.error("%s", error.message)
            return self._control.list_cold(path.name, path.path, revision=path.revision, weight=path.weight, now=now)

"""What was loaded over the API: told here after each change, kept in --lora-state, with the uploads in their spool.

Lives as long as the server, over its engines. Called by the admin's routes on the loop; files are written in threads.
"""

import asyncio
import collections
import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

import msgspec

from engine.config import EngineConfig, LoraPath
from engine.types import AdapterInfo
from gateway import lora_state
from gateway.errors import ApiError
from gateway.lora_paths import name_problem
from gateway.lora_state import Loaded, State
from gateway.settings import Settings, SettingsError
from gateway.spool import Spool, default_root

UPLOADED = "(uploaded)"  # what is told of an upload's source
REMEMBERED = 256  # a load in place is told here right after the engine has told that the old version is gone

log = logging.getLogger(__name__)


class Keeper:
    """`state` is what the file holds, or would hold."""

    def __init__(self, spool: Spool, state: State, file: Path | None = None, paths: tuple[LoraPath, ...] = ()) -> None:
        self.spool = spool
        self.state = state
        self._file = file
        self._paths = paths  # --lora-paths
        self._writes = asyncio.Lock()
        self._serving: dict[str, int] = {}  # upload -> the adapter_id that it was loaded as
        self._replaced: dict[int, str] = {}  # adapter_id that gave way to a load in place -> the upload it came from
        self._gone: collections.deque[int] = collections.deque(maxlen=REMEMBERED)  # adapter_ids that left the engine

    @classmethod
    @contextlib.contextmanager
    def open(cls, settings: Settings) -> Iterator[Self]:
        """Reads --lora-state and takes the spool, until the block is left.

        Raises:
            SettingsError: the file cannot be read or written, or another server has it.
        """
        file = None if settings.lora_state is None else Path(settings.lora_state).expanduser().absolute()
        root = Path(settings.lora_spool_dir).expanduser() if settings.lora_spool_dir else default_root()
        known = None if file is None else lora_state.read(file)
        state = known or lora_state.fresh()
        _check_names(file, state, settings.engine.served_model_name)
        spool = Spool(root, None if file is None else state.spool)
        try:
            if file is not None:
                spool.open(state.uploads)
                lora_state.sweep(file)
                _write_first(file, state)
            yield cls(spool, state, file, settings.engine.lora_paths)
        finally:
            spool.close()

    def start_config(self, config: EngineConfig, preload: Collection[str] = ()) -> EngineConfig:
        """`config` with the adapters that were served before; those in `preload` have room before others."""
        for path in config.lora_paths:
            if self.state.named(path.name) is not None:
                log.warning("adapter %r of --lora-paths gives way to the one of --lora-state", path.name)
        return msgspec.structs.replace(
            config,
            enable_lora=config.enable_lora or bool(self.state.adapters),
            lora_paths=lora_state.start_paths(self.state, config.lora_paths),
            lora_restored=tuple(self._restored(entry, preload) for entry in self.state.adapters),
        )

    async def loaded(self, info: AdapterInfo, source: str, before: AdapterInfo | None = None) -> None:
        """An adapter was loaded from `source`; `before` bore its name when a load in place was asked for.

        The running sequences of what it replaced may go on.
        """
        token = self.spool.token_of(source)
        if token is not None:
            self._serving[token] = info.adapter_id
        entry = Loaded(
            name=info.name,
            source=source if token is None else None,
            revision=info.revision,
            upload=token,
            pinned=info.pinned,
            weight=info.weight,
        )
        old = self.state.named(info.name)
        self.state = lora_state.with_loaded(self.state, entry, self._paths)
        await self._save()
        if old is not None and old.upload is not None and old.upload != token:
            await self._drop_replaced(old.upload, info.adapter_id, before)

    async def _drop_replaced(self, token: str, successor: int, before: AdapterInfo | None) -> None:
        """The upload of a load that another took the place of stays while sequences may come back to it."""
        adapter_id = self._serving.pop(token, None)
        if before is not None and self.spool.token_of(before.source) == token:
            adapter_id = before.adapter_id  # as the engine that runs counts it
        if adapter_id is None or adapter_id == successor or adapter_id in self._gone:
            await self._remove(token)
        else:
            self._replaced[adapter_id] = token

    def removed(self, adapter_id: int) -> None:
        """The engine holds nothing of this adapter any more."""
        self._gone.append(adapter_id)
        if (token := self._replaced.pop(adapter_id, None)) is not None:
            self._remove_later(token)

    def engine_lost(self) -> None:
        """Another engine counts its adapters anew."""
        for token in self._replaced.values():
            self._remove_later(token)
        self._serving.clear()
        self._replaced.clear()
        self._gone.clear()

    async def unloaded(self, name: str) -> None:
        """An adapter is gone, and with it what was uploaded."""
        old = self.state.named(name)
        self.state = lora_state.without(self.state, name, self._paths)
        await self._save()
        if old is not None and old.upload is not None:
            self._serving.pop(old.upload, None)
            await self._remove(old.upload)

    def holds(self, token: str) -> bool:
        """Whether an upload is an adapter's source, or sequences may come back to it."""
        return token in self.state.uploads or token in self._replaced.values()

    async def pinned(self, name: str, pinned: bool) -> None:
        """An adapter was pinned or unpinned."""
        self.state = lora_state.with_pin(self.state, name, pinned, self._paths)
        await self._save()

    def told_source(self, adapter: AdapterInfo) -> str:
        """An adapter's source for an admin's eyes."""
        return adapter.source if self.spool.token_of(adapter.source) is None else UPLOADED

    async def _remove(self, token: str) -> None:
        await asyncio.to_thread(self.spool.remove, token)

    def _remove_later(self, token: str) -> None:
        asyncio.get_running_loop().run_in_executor(None, self.spool.remove, token)

    async def _save(self) -> None:
        """Writes what is known now; changes that come meanwhile are written after it."""
        if self._file is None:
            return
        async with self._writes:
            try:
                await asyncio.to_thread(lora_state.write, self._file, self.state)
            except OSError as error:
                log.error("--lora-state %s cannot be written: %s", self._file, error)
                reason = f"It is done, but --lora-state could not be written ({error.strerror}): a restart forgets it."
                raise ApiError(507, reason, code="state_not_written") from error

    def _restored(self, entry: Loaded, preload: Collection[str]) -> LoraPath:
        path = str(self.spool.path(entry.upload)) if entry.upload is not None else entry.source or ""
        return LoraPath(
            name=entry.name,
            path=path,
            pinned=entry.pinned,
            revision=entry.revision,
            weight=entry.weight,
            preload=entry.name in preload,
        )


def _check_names(file: Path | None, state: State, base: str) -> None:
    if len({entry.name for entry in state.adapters}) < len(state.adapters):
        raise SettingsError(f"--lora-state {file}: two adapters bear one name; move the file away to start without it")
    for entry in state.adapters:
        problem = name_problem(entry.name, base)
        if problem is None and (entry.source is None) == (entry.upload is None):
            problem = f"{entry.name!r} has no source"
        if problem is not None:
            raise SettingsError(f"--lora-state {file}: {problem}; move the file away to start without it")


def _write_first(file: Path, state: State) -> None:
    """At the start, so that a file that cannot be written is told then."""
    try:
        lora_state.write(file, state)
    except OSError as error:
        raise SettingsError(f"--lora-state {file}: cannot be written: {error.strerror or error}") from error

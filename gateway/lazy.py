"""Adapters that are served on first use: folders in --lora-dir, hub repositories that --lora-hub-allow names.

Called where a request names what is not loaded. A name is checked before it touches a path or leaves the machine.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from engine.types import ADAPTER_FILES, CONFIG_FILE, HUB_PREFIX, AdapterInfo, AdapterState, EngineError, ErrorCode
from gateway.errors import ApiError, from_engine
from gateway.lora_paths import name_problem
from gateway.settings import SettingsError
from gateway.state import Engine

REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]+/[A-Za-z0-9._*?\[\]!-]+")
ABSENT_NAMES = 1024  # remembered at once
ABSENT_SECONDS = 5.0  # a folder that was not there is looked for again after this
MISSING_SECONDS = 60.0  # the same of a repository that the hub does not have, or did not deliver
MOST_LOOKUPS = 64  # of repositories at once; further ones are told to come again


class Lazy:
    """Outlives the engines; `engine` is passed with each call."""

    def __init__(self, folder: Path | None, patterns: Sequence[str], clock: Callable[[], float]) -> None:
        """Raises SettingsError: --lora-dir is no folder, or a pattern is none."""
        if folder is not None and not folder.is_dir():
            raise SettingsError(f"--lora-dir {folder}: there is no such folder")
        for pattern in patterns:
            if not PATTERN.fullmatch(pattern):
                raise SettingsError(f"--lora-hub-allow {pattern!r}: wanted is owner/name, both may hold * ? [...]")
        self._root = None if folder is None else folder.resolve()
        self._patterns = [pattern.split("/") for pattern in patterns]
        self._clock = clock
        self._absent = AbsentNames(ABSENT_NAMES)
        self._offered: set[str] = set()
        self._lookups: dict[str, asyncio.Task[AdapterInfo | None]] = {}

    async def find(self, engine: Engine, name: str) -> AdapterInfo | None:
        """The adapter of this name, known to the engine from now on; None where there is none.

        Raises:
            ApiError: too many names are being looked up, or the hub did not deliver.
        """
        if not engine.model.enable_lora or name_problem(name, engine.model.served_name) is not None:
            return None
        if (source := self._source(name)) is None:
            return None
        if (refusal := self._absent.find(name, self._clock())) is not None:
            refusal.tell()
            return None
        if name not in self._lookups:
            self._start(engine, name, source)
        return await asyncio.shield(self._lookups[name])

    async def has_left(self, engine: Engine, adapter: AdapterInfo) -> bool:
        """Whether a folder was taken away whose adapter is no longer in memory; the engine forgets it then."""
        path = self._folder(adapter.name)
        is_ours = adapter.name in self._offered and adapter.source == str(path)  # not loaded from elsewhere since
        away = adapter.state in (AdapterState.COLD, AdapterState.FAILED)
        if path is None or not is_ours or not away or await asyncio.to_thread(_holds, path):
            return False
        try:
            await engine.unload_adapter(adapter.name)
        except EngineError as error:
            if error.code is not ErrorCode.ADAPTER_NOT_FOUND:  # somebody else was told the same
                raise
        self._offered.discard(adapter.name)
        return True

    def _source(self, name: str) -> str | None:
        if (folder := self._folder(name)) is not None:
            return str(folder)
        return f"{HUB_PREFIX}{name}" if self._is_allowed(name) else None

    def _folder(self, name: str) -> Path | None:
        plain = "/" not in name and not name.startswith(".")
        return self._root / name if self._root is not None and plain else None

    def _is_allowed(self, name: str) -> bool:
        if not REPOSITORY.fullmatch(name):
            return False
        parts = name.split("/")
        return any(all(map(fnmatchcase, parts, pattern)) for pattern in self._patterns)

    def _start(self, engine: Engine, name: str, source: str) -> None:
        if "/" in name and sum("/" in other for other in self._lookups) >= MOST_LOOKUPS:
            raise ApiError(
                503, "Too many adapters are being looked for.", code="queue_full", headers={"retry-after": "1"}
            )
        self._lookups[name] = task = asyncio.create_task(self._look(engine, name, source), name="lazy")
        task.add_done_callback(lambda task: self._looked(name, task))

    def _looked(self, name: str, task: "asyncio.Task[AdapterInfo | None]") -> None:
        del self._lookups[name]
        if not task.cancelled():
            task.exception()  # everyone who asked may have gone

    async def _look(self, engine: Engine, name: str, source: str) -> AdapterInfo | None:
        local = not source.startswith(HUB_PREFIX)
        if local and not await asyncio.to_thread(_is_inside, Path(source), self._root):
            self._miss(name, ABSENT_SECONDS, None)
            return None
        try:
            adapter = await engine.offer_adapter(name, source)
        except EngineError as error:
            if error.code is ErrorCode.ENGINE_DEAD:
                raise
            self._miss(name, MISSING_SECONDS, None if error.code is ErrorCode.ADAPTER_NOT_FOUND else error)
            return None
        self._offered.add(name)
        return adapter

    def _miss(self, name: str, seconds: float, error: EngineError | None) -> None:
        refusal = Refusal(error)
        self._absent.add(name, refusal, self._clock() + seconds)
        refusal.tell()


class Refusal:
    """Why a name is not served: there is nothing, or an error."""

    def __init__(self, error: EngineError | None) -> None:
        self._error = error

    def tell(self) -> None:
        """Returns where there is nothing. Raises ApiError where something failed."""
        if self._error is not None:
            raise from_engine(self._error)


class AbsentNames:
    """Names that were looked for in vain, for a time; the oldest go first when there are too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._until: OrderedDict[str, tuple[float, Refusal]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, name: str, refusal: Refusal, until: float) -> None:
        self._until[name] = (until, refusal)
        self._until.move_to_end(name)
        while len(self._until) > self._most:
            self._until.popitem(last=False)

    def find(self, name: str, now: float) -> Refusal | None:
        """None where nothing is remembered of it, or not any more."""
        until, refusal = self._until.get(name, (now, None))
        if now >= until:
            self._until.pop(name, None)
            return None
        return refusal


def _holds(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _is_inside(folder: Path, root: Path | None) -> bool:
    """Whether it holds an adapter, and neither it nor a file of it is a link that leads out."""
    assert root is not None
    if not _holds(folder):
        return False
    return all(path.resolve().is_relative_to(root) for path in (folder, *(folder / name for name in ADAPTER_FILES)))

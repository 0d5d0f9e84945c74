"""Adapters' files from the Hugging Face hub: fetched in threads of their own, few at a time, each with a time-out.

Called on the engine's loop. Reads of local folders never wait behind the hub, whatever it does.
"""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from engine.adapters.snapshot import fetch_from_hub
from engine.adapters.source import hub_repository
from engine.adapters.spec import invalid
from engine.types import ADAPTER_FILES, EngineError, ErrorCode

HUB_SECONDS = 120.0
HUB_THREADS = 4  # a thread that nobody waits for any more still counts until its connection gives up

Key = tuple[str, str | None]  # repository, revision


class Hub:
    """What was fetched is remembered, so that an adapter that comes back needs no hub."""

    def __init__(
        self, seconds: float = HUB_SECONDS, *, threads: int = HUB_THREADS,
        fetch: Callable[[str, str | None], Path] = fetch_from_hub,
    ) -> None:  # fmt: skip
        """`seconds`: until a fetch is given up, its wait for a thread included."""
        self._seconds = seconds
        self._fetch = fetch
        self._free = asyncio.Semaphore(threads)
        self._fetches: dict[Key, asyncio.Task[Path]] = {}
        self._folders: dict[Key, Path] = {}

    async def resolve(self, source: str, revision: str | None, *, again: bool) -> str:
        """The source as a reader takes it: a hub repository's files as a local folder, anything else as it is.

        `again` asks the hub also about what was fetched before. Raises EngineError with the reason.
        """
        repo = await asyncio.to_thread(hub_repository, source)
        if repo is None:
            return source
        folder = self._folders.get((repo, revision))
        if again or folder is None or not await asyncio.to_thread(_is_whole, folder):
            folder = await self._once((repo, revision))
        return str(folder)

    async def _once(self, key: Key) -> Path:
        """Whoever asks for the same meanwhile waits for the same fetch; it goes on when they give up."""
        if key not in self._fetches:
            self._fetches[key] = asyncio.create_task(self._in_thread(key), name="hub")
            self._fetches[key].add_done_callback(lambda task: self._fetched(key, task))
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(self._fetches[key])
        except TimeoutError:
            message = f"{key[0]}: the hub did not deliver within {self._seconds:g} s"
            raise EngineError(ErrorCode.ADAPTER_UNAVAILABLE, message) from None

    def _fetched(self, key: Key, task: "asyncio.Task[Path]") -> None:
        del self._fetches[key]
        if not task.cancelled() and task.exception() is None:
            self._folders[key] = task.result()

    async def _in_thread(self, key: Key) -> Path:
        async with self._free:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[Path] = loop.create_future()
            threading.Thread(target=self._run, args=(key, loop, done), name="hub", daemon=True).start()
            return await done

    def _run(self, key: Key, loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Path]") -> None:
        """In a daemon thread: an engine that stops does not wait for the hub."""
        try:
            folder = self._fetch(*key)
        except EngineError as error:
            _tell(loop, done, error)
        except Exception as error:
            _tell(loop, done, invalid(f"{key[0]}: {type(error).__name__}: {error}"))
        else:
            _tell(loop, done, folder)


def _tell(loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Path]", result: Path | EngineError) -> None:
    def settle() -> None:
        if done.done():
            return
        if isinstance(result, EngineError):
            done.set_exception(result)
        else:
            done.set_result(result)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ADAPTER_FILES)

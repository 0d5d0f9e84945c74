"""Where uploaded adapters lie: each in a folder of its own under a name drawn here. Blocking; called in threads.

An upload becomes a source by one rename, so that nothing half written ever is one. One server at a time holds a spool.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from gateway.settings import SettingsError

TOKEN = re.compile(r"[0-9a-f]{32}")
STAGING = ".part"
TEMPORARY = "run-"  # spools that end with their server
LOCK = "lock"


def new_token() -> str:
    return secrets.token_hex(16)


def default_root() -> Path:
    """$LORAMUX_CACHE, else $XDG_CACHE_HOME/loramux, else ~/.cache/loramux; in there `spool`."""
    if root := os.environ.get("LORAMUX_CACHE"):
        return Path(root).expanduser() / "spool"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loramux" / "spool"


class Spool:
    """One server's uploads: `root/token`, or `root/run-token` where they need not outlive the server."""

    def __init__(self, root: Path, token: str | None = None) -> None:
        """Makes nothing yet. Without a token it is temporary: made for the first upload, and gone with `close`."""
        self.folder = root.absolute() / (token or f"{TEMPORARY}{new_token()}")
        self._lock: BinaryIO | None = None
        self._guard = threading.Lock()

    def open(self, keep: Collection[str] = ()) -> None:
        """Takes the spool and removes what is not in `keep`.

        Raises:
            SettingsError: it cannot be made, or another server holds it.
        """
        try:
            if not self._take():
                raise SettingsError("--lora-state: another server that runs has this file")
            self._sweep(keep)
        except OSError as error:
            raise SettingsError(f"--lora-spool-dir {self.folder.parent}: {error.strerror or error}") from error

    def stage(self) -> Path:
        """A fresh folder to write an upload to. Raises OSError."""
        with self._guard:
            if self._lock is None:
                self._take()
        folder = self.folder / f"{new_token()}{STAGING}"
        folder.mkdir(mode=0o700)
        return folder

    def commit(self, staged: Path) -> str:
        """Makes what was staged last, and a source; its token."""
        for file in staged.iterdir():
            sync(file)
        sync(staged)
        token = staged.name.removesuffix(STAGING)
        staged.rename(self.folder / token)
        sync(self.folder)
        return token

    def path(self, token: str) -> Path:
        return self.folder / token

    def token_of(self, source: str) -> str | None:
        """The token of an adapter's source; None where it is no upload."""
        path = Path(source)
        return path.name if path.parent == self.folder and TOKEN.fullmatch(path.name) else None

    def remove(self, token: str) -> None:
        """Removes an upload; one that is gone already is fine."""
        shutil.rmtree(self.path(token), ignore_errors=True)

    def discard(self, staged: Path) -> None:
        """Removes what was staged and not committed."""
        shutil.rmtree(staged, ignore_errors=True)

    def close(self) -> None:
        """Gives the spool up; one that is temporary goes with all its uploads."""
        if self._lock is not None:
            if self.folder.name.startswith(TEMPORARY):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def _take(self) -> bool:
        """Whether it is this server's now; another one may have it."""
        root = self.folder.parent
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root / LOCK):
            _sweep_abandoned(root)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = _try_lock(self.folder / LOCK)
        return self._lock is not None

    def _sweep(self, keep: Collection[str]) -> None:
        for folder in self.folder.iterdir():
            token = folder.name.removesuffix(STAGING)
            if TOKEN.fullmatch(token) and folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def _sweep_abandoned(root: Path) -> None:
    """Temporary spools whose server was killed: nobody holds their lock."""
    for folder in root.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # another user's, or its own server removes it just now
            if (lock := _try_lock(folder / LOCK)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock, which is held only while a server starts."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(path: Path) -> BinaryIO | None:
    """The lock, held until it is closed; None where somebody has it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def sync(path: Path) -> None:
    """A power cut leaves what was synced, a file or a folder's entries. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Where an adapter's files come from: a local folder or the Hugging Face hub. Blocking; loads call it in a thread.

A folder wins where both could be meant; `hub:owner/name` never means one. Only the two files of ADAPTER_FILES are ever
fetched or opened, and only if they are regular files.
"""

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from engine.adapters.snapshot import fetch_from_hub
from engine.adapters.spec import invalid
from engine.config import MAX_LORA_HUB_BYTES
from engine.types import ADAPTER_FILES, CONFIG_FILE, HUB_PREFIX, TENSORS_FILE

MAX_SOURCE = 1024
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|/?$)|(file|data|https?|s3|gs|hf):")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def resolve_source(source: str, revision: str | None = None, max_hub_bytes: int = MAX_LORA_HUB_BYTES) -> Path:
    """The local folder with the adapter's files; a hub repository is fetched, or taken from the hub's cache.

    Raises EngineError (ADAPTER_INVALID) for a source that is refused or cannot be had, with the reason.
    """
    repo = hub_repository(source)
    if repo is not None:
        return fetch_from_hub(repo, revision, max_hub_bytes)
    folder = _local(source)
    if not folder.is_dir():
        raise invalid(f"{source}: not a folder (a folder with {CONFIG_FILE} and {TENSORS_FILE} is wanted)")
    if revision is not None:
        raise invalid(f"{source}: a revision ({revision!r}) can be asked of a hub repository only, this is a folder")
    return folder.resolve()


def hub_repository(source: str) -> str | None:
    """The repository that a source names; None where it is a local path that is there.

    Raises EngineError (ADAPTER_INVALID) for a source that is refused, or is neither.
    """
    check_source(source)
    if source.startswith(HUB_PREFIX):
        repo = source.removeprefix(HUB_PREFIX)
        if not _HUB_ID.fullmatch(repo):
            raise invalid(f"{source}: '{HUB_PREFIX}' goes before the id of a Hugging Face repository, owner/name")
        return repo
    if _exists(_local(source)):
        return None
    if not _HUB_ID.fullmatch(source):
        raise invalid(f"{source}: there is no such folder")
    return source


def refuse_outside(folder: Path, root: Path) -> None:
    """Raises EngineError (ADAPTER_INVALID) where an adapter's folder, or one of its files, lies outside `root`."""
    real = root.resolve()
    for path in (folder, *(folder / name for name in ADAPTER_FILES)):
        if not path.resolve().is_relative_to(real):
            raise invalid("a link in it leads out of --lora-dir")


def check_source(source: str) -> None:
    """Refuses what no adapter is ever loaded from: parent folders, NUL, URLs. Raises EngineError (ADAPTER_INVALID)."""
    if not source or len(source) > MAX_SOURCE:
        raise invalid(
            f"the adapter's path is {'longer than ' + str(MAX_SOURCE) + ' characters' if source else 'empty'}"
        )
    if any(ord(character) < 32 or ord(character) == 127 for character in source):
        raise invalid(f"{source!r}: control characters are not allowed in an adapter's path")
    if ".." in re.split(r"[/\\]", source):
        raise invalid(f"{source}: '..' is not allowed in an adapter's path")
    if _URL.match(source):
        raise invalid(f"{source}: URLs are not supported; name a local folder or a Hugging Face repository")


def open_adapter_file(folder: Path, name: str, max_bytes: int | None = None) -> BinaryIO:
    """Opens one of ADAPTER_FILES for reading; links are followed, but must end at a regular file.

    Raises EngineError (ADAPTER_INVALID) with the reason, never an OSError.
    """
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise invalid(f"{name} is not a regular file")
        stream = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise invalid(_missing(folder, name)) from None
    except OSError as error:
        raise invalid(f"{name} cannot be read: {error.strerror}") from None
    return _checked(stream, name, max_bytes)


def _checked(stream: BinaryIO, name: str, max_bytes: int | None) -> BinaryIO:
    """What was opened may not be what was looked at."""
    status = os.fstat(stream.fileno())
    fault = None if stat.S_ISREG(status.st_mode) else "is not a regular file"
    if max_bytes is not None and status.st_size > max_bytes:
        fault = f"has {status.st_size:,} bytes; at most {max_bytes:,} are read"
    if fault:
        stream.close()
        raise invalid(f"{name} {fault}")
    return stream


def _missing(folder: Path, name: str) -> str:
    """Why a file that is not there is not there, as far as its neighbours tell."""
    if name == TENSORS_FILE and _exists(folder / "adapter_model.bin"):
        return f"the adapter has only adapter_model.bin, a pickle, which is never opened; save it as {TENSORS_FILE}"
    if name == TENSORS_FILE and _exists(folder / f"{TENSORS_FILE}.index.json"):
        return f"the adapter is split into several files; save it as one {TENSORS_FILE}"
    return f"the adapter has no {name} (adapters in PEFT's format are wanted; pickles are never opened)"


def _local(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # there is no such user
        return Path(source)


def _exists(path: Path) -> bool:
    """Without an error for what no file system can hold."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False

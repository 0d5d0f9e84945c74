"""The file of --lora-state: which adapters were loaded over the API, and what it changed about those of --lora-paths.

Pure functions change a `State`; `read` and `write` are blocking. A file is replaced whole or not at all.
"""

import contextlib
import glob
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from engine.config import LoraPath
from gateway.lora_paths import Weight
from gateway.settings import SettingsError
from gateway.spool import STAGING, TOKEN, new_token, sync

Token = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._/-]{1,128}\Z")]


class Loaded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One adapter that was loaded over the API."""

    name: Name
    source: str | None = None  # as given; None: an upload
    revision: str | None = None
    upload: Token | None = None  # its folder in the spool
    pinned: bool = False
    weight: Weight = 1.0


class Changed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the API changed about an adapter of --lora-paths; in force while the flag names the same source."""

    name: Name
    source: str
    unloaded: bool = False
    pinned: bool | None = None


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `adapters` are in the order of their loads."""

    version: Literal[1] = 1
    spool: Token
    adapters: tuple[Loaded, ...] = ()
    lora_paths: tuple[Changed, ...] = ()

    @property
    def uploads(self) -> frozenset[str]:
        """Tokens of the uploads that are sources."""
        return frozenset(entry.upload for entry in self.adapters if entry.upload is not None)

    def named(self, name: str) -> Loaded | None:
        return next((entry for entry in self.adapters if entry.name == name), None)


def fresh() -> State:
    return State(spool=new_token())


def with_loaded(state: State, entry: Loaded, paths: tuple[LoraPath, ...]) -> State:
    """An adapter was loaded; one that bore the name before, in place of which it came, is gone."""
    kept = without(state, entry.name, paths)
    place = next((i for i, old in enumerate(state.adapters) if old.name == entry.name), len(kept.adapters))
    adapters = (*kept.adapters[:place], entry, *kept.adapters[place:])
    return msgspec.structs.replace(kept, adapters=adapters)


def without(state: State, name: str, paths: tuple[LoraPath, ...]) -> State:
    """An adapter was unloaded."""
    state = msgspec.structs.replace(state, adapters=tuple(old for old in state.adapters if old.name != name))
    path = next((path for path in paths if path.name == name), None)
    return state if path is None else _with_change(state, Changed(name=name, source=path.path, unloaded=True))


def with_pin(state: State, name: str, pinned: bool, paths: tuple[LoraPath, ...]) -> State:
    """An adapter was pinned or unpinned."""
    if state.named(name) is not None:
        adapters = (msgspec.structs.replace(e, pinned=pinned) if e.name == name else e for e in state.adapters)
        return msgspec.structs.replace(state, adapters=tuple(adapters))
    path = next((path for path in paths if path.name == name), None)
    return state if path is None else _with_change(state, Changed(name=name, source=path.path, pinned=pinned))


def start_paths(state: State, paths: tuple[LoraPath, ...]) -> tuple[LoraPath, ...]:
    """--lora-paths as the API left them, without those whose name was given to an adapter of the API."""
    changes = {(change.name, change.source): change for change in state.lora_paths}
    kept = []
    for path in paths:
        change = changes.get((path.name, path.path))
        if (change is not None and change.unloaded) or state.named(path.name) is not None:
            continue
        pinned = path.pinned if change is None or change.pinned is None else change.pinned
        kept.append(msgspec.structs.replace(path, pinned=pinned))
    return tuple(kept)


def read(path: Path) -> State | None:
    """None where there is no file yet.

    Raises:
        SettingsError: it cannot be read, or is not what this server writes.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"--lora-state {path}: cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(
            f"--lora-state {path}: this is no state that loramux wrote ({error}); move it away to start without it"
        ) from error


def write(path: Path, state: State) -> None:
    """Replaces the file; a crash leaves the old one or the new one. Raises OSError."""
    staged = path.with_name(f"{path.name}.{new_token()}{STAGING}")
    try:
        with staged.open("xb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    sync(path.parent)


def sweep(path: Path) -> None:
    """Removes what a server that died while it wrote left beside the file; the file is this server's alone."""
    for staged in path.parent.glob(f"{glob.escape(path.name)}.*{STAGING}"):
        if TOKEN.fullmatch(staged.name.removeprefix(f"{path.name}.").removesuffix(STAGING)):
            with contextlib.suppress(OSError):
                staged.unlink()


def _with_change(state: State, change: Changed) -> State:
    others = tuple(old for old in state.lora_paths if old.name != change.name)
    return msgspec.structs.replace(state, lora_paths=(*others, change))

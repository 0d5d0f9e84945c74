"""Adapters as users name them: the values of --lora-paths, and the rules for an adapter's name."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from engine.config import LoraPath
from gateway.errors import quote
from gateway.settings import SettingsError

NAME_PATTERN = re.compile(r"[A-Za-z0-9._/-]{1,128}")
NAME_RULE = "a name is 1 to 128 of the characters A-Z a-z 0-9 . _ / - without '..' and without a leading slash"


# Of an adapter's share under --schedule-policy fair.
Weight = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class LoraEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One JSON object of --lora-paths, with SGLang's keys."""

    lora_name: str
    lora_path: Annotated[str, msgspec.Meta(min_length=1)]
    pinned: bool = False
    revision: str | None = None  # of a hub repository
    weight: Weight = 1.0


def name_problem(name: str, base: str) -> str | None:
    """Why no adapter of this base may bear the name; None where it may."""
    if not NAME_PATTERN.fullmatch(name) or ".." in name or name.startswith("/"):
        return f"{quote(name)} cannot name an adapter: {NAME_RULE}"
    if name == base:
        return f"{quote(name)} is the base model's name, which no adapter may bear"
    return None


def parse_lora_paths(values: Sequence[str], base: str) -> tuple[LoraPath, ...]:
    """`name=path`, a bare path (named by its last component) or JSON, one entry a value; JSON may be a list.

    Raises:
        SettingsError: an entry is malformed, or two bear one name.
    """
    entries = tuple(entry for value in values for entry in _entries(value))
    seen: set[str] = set()
    for entry in entries:
        if problem := name_problem(entry.name, base) or _path_problem(entry.path):
            raise SettingsError(f"--lora-paths: {problem}")
        if entry.name in seen:
            raise SettingsError(f"--lora-paths: two adapters are named {quote(entry.name)}")
        seen.add(entry.name)
    return entries


def _entries(value: str) -> Iterator[LoraPath]:
    if value.lstrip().startswith(("{", "[")):
        yield from map(_from_json, _decode(value))
        return
    name, equals, path = value.partition("=")
    if not equals:
        name, path = Path(value).name, value
    if not path:
        raise SettingsError(f"--lora-paths: {quote(value)} names no path")
    yield LoraPath(name=name, path=path)


def _decode(value: str) -> list[LoraEntry]:
    try:
        decoded = msgspec.json.decode(value, type=LoraEntry | list[LoraEntry])
    except (msgspec.DecodeError, RecursionError) as error:
        raise SettingsError(
            f"--lora-paths: {quote(value)} is no JSON object with lora_name, lora_path and, if wanted, pinned ({error})"
        ) from None
    return [decoded] if isinstance(decoded, LoraEntry) else decoded


def _from_json(entry: LoraEntry) -> LoraPath:
    return LoraPath(
        name=entry.lora_name, path=entry.lora_path, pinned=entry.pinned, revision=entry.revision, weight=entry.weight
    )


def _path_problem(path: str) -> str | None:
    """A path that can only be meant locally must be there; whether it holds an adapter is the engine's to check."""
    if "\0" in path:
        return f"{quote(path)}: no path holds a NUL"
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        return f"{quote(path, 256)} is not a folder"
    return f"there is no folder {quote(path, 256)}" if looks_local and not folder.exists() else None


def demo_adapters(folder: Path) -> tuple[LoraPath, ...]:
    """The repository's own adapters lora0, lora1 and so on; none where the package is installed without them."""
    found = [path for path in folder.glob("lora*") if path.name[4:].isdecimal() and _holds_adapter(path)]
    return tuple(
        LoraPath(name=path.name, path=str(path)) for path in sorted(found, key=lambda path: int(path.name[4:]))
    )


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()

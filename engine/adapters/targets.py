"""Which modules a PEFT config names: target_modules, exclude_modules, layers_to_transform, and patterns by module.

Module names are the ones that PEFT saw in training, such as `model.layers.0.self_attn.q_proj`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Generic, TypeVar

import regex

from engine.adapters.spec import invalid

ALL_LINEAR = "all-linear"
MATCH_SECONDS = 0.05  # for one pattern and one name; a sane one takes microseconds
MAX_PATTERN = 4096  # characters
MAX_EXPANDED = 200_000  # characters times counted repeats, which compiling writes out

V = TypeVar("V")


class Pattern:
    """A regular expression from a foreign file: bounded in size and time, matched without the interpreter's lock."""

    def __init__(self, text: str, key: str, *, suffix: bool = False) -> None:
        """`suffix`: a name's last components may match alone. Raises EngineError (ADAPTER_INVALID)."""
        self._text, self._key = text, key
        if len(text) > MAX_PATTERN or len(text) * prod(_counts(text)) > MAX_EXPANDED:
            raise self._fault("is too large")
        try:
            self._compiled = regex.compile(rf"(.*\.)?({text})$" if suffix else text)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            raise self._fault(f"is no regular expression ({error})") from None

    def matches(self, name: str) -> bool:
        """Whether the whole name matches. Raises EngineError (ADAPTER_INVALID) where that takes too long."""
        try:
            return self._compiled.fullmatch(name, timeout=MATCH_SECONDS) is not None
        except TimeoutError:
            raise self._fault("takes too long to match") from None

    def _fault(self, reason: str) -> Exception:
        return invalid(f"adapter_config.json: {self._key}: the pattern {self._text[:80]!r} {reason}")


@dataclass(frozen=True, slots=True)
class Names:
    """Names that a module's name equals or ends with."""

    names: tuple[str, ...]

    def matches(self, name: str) -> bool:
        return any(ends_with(name, target) for target in self.names)


@dataclass(frozen=True, slots=True)
class Everything:
    """`all-linear`: all of the seven modules, in every layer."""

    def matches(self, _name: str) -> bool:
        return True


Matcher = Names | Pattern | Everything


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules that an adapter trains."""

    modules: Matcher
    exclude: Matcher = Names(())
    layers: frozenset[int] | None = None  # None: every layer

    def cover(self, name: str, layer: int) -> bool:
        """Whether the module of this name and layer is trained. As in PEFT, `layers` do not touch full names."""
        if self.exclude.matches(name):
            return False
        if isinstance(self.modules, Names) and name in self.modules.names:
            return True
        return (self.layers is None or layer in self.layers) and self.modules.matches(name)


@dataclass(frozen=True, slots=True)
class Overrides(Generic[V]):
    """A rank_pattern or alpha_pattern: the first entry whose pattern matches a name, or its last components, counts."""

    entries: tuple[tuple[Pattern, V], ...]
    exact: Mapping[str, V]

    @staticmethod
    def of(values: Mapping[str, V], key: str) -> "Overrides[V]":
        entries = tuple((Pattern(text, key, suffix=True), value) for text, value in values.items())
        return Overrides(entries, dict(values))

    def value(self, name: str, default: V) -> V:
        found = (value for pattern, value in self.entries if pattern.matches(name))
        return next(found, self.exact.get(name, default))


def ends_with(name: str, target: str) -> bool:
    """Whether `target` is the name or its last components."""
    return name == target or name.endswith(f".{target}")


def _counts(text: str) -> Iterator[int]:
    """The numbers in counted repeats such as {2,30}."""
    return (
        max(1, int(number[:9])) for part in re.findall(r"\{([\d,]*)\}", text) for number in re.findall(r"\d+", part)
    )

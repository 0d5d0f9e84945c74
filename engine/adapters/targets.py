"""Which modules a PEFT config names: target_modules, exclude_modules, layers_to_transform, and patterns by module.

Module names are the ones that PEFT saw in training, such as `model.layers.0.self_attn.q_proj`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.adapters.spec import invalid

ALL_LINEAR = "all-linear"
MAX_PATTERN = 4096  # characters
MAX_UNBOUNDED = 6  # unbounded repeats in one pattern: matching takes a power of the name's length

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Targets:
    """`modules` and `exclude` are names that a module's name equals or ends with, or a regular expression."""

    modules: tuple[str, ...] | str
    exclude: tuple[str, ...] | str = ()
    layers: frozenset[int] | None = None  # None: every layer

    def __contains__(self, item: tuple[str, int]) -> bool:
        """Whether the module of this name and layer is trained."""
        name, layer = item
        if self.exclude and names_module(self.exclude, name):
            return False
        return (self.layers is None or layer in self.layers) and names_module(self.modules, name)


def names_module(targets: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return any(ends_with(name, target) for target in targets)


def ends_with(name: str, target: str) -> bool:
    """Whether `target` is the name or its last components."""
    return name == target or name.endswith(f".{target}")


def pattern_value(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value of the first pattern that matches the name or its last components."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return patterns.get(name, default)


def check_pattern(pattern: str, key: str) -> None:
    """Refuses what is no regular expression, and one whose matching could take for ever.

    Matching holds the interpreter's lock, so a pattern from a foreign file must not be able to stop the server.
    Raises EngineError (ADAPTER_INVALID).
    """
    if len(pattern) > MAX_PATTERN:
        raise invalid(f"adapter_config.json: {key}: a pattern has more than {MAX_PATTERN} characters")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise invalid(f"adapter_config.json: {key}: {pattern!r} is no regular expression ({error})") from None
    if _repeats_repeat(pattern) or _unbounded(pattern) > MAX_UNBOUNDED:
        raise invalid(f"adapter_config.json: {key}: {pattern!r} repeats too much to be matched in bounded time")


_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?[:=!]|\?<[=!]|\?P<\w+>)?|\)|\{\d*,?\d*\}|[*+?|]|.", re.DOTALL
)


def _repeats_repeat(pattern: str) -> bool:
    """Whether a group that is itself repeated holds repeats or alternatives."""
    inside = [False]  # for each open group: holds repeats or alternatives
    closed = False  # the group that ended just now holds some
    for token in _TOKEN.findall(pattern):
        if token[0] in "*+{" and closed:
            return True
        closed = False
        if token[0] == "(":
            inside.append(False)
        elif token == ")" and len(inside) > 1:
            closed = inside.pop()
            inside[-1] |= closed
        elif token[0] in "*+?|{":
            inside[-1] = True
    return False


def _unbounded(pattern: str) -> int:
    return sum(token[0] in "*+" or (token[0] == "{" and token.endswith(",}")) for token in _TOKEN.findall(pattern))

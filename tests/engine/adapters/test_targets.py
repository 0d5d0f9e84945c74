"""Names and patterns are matched as PEFT matches them; hostile patterns cost neither time nor memory."""

import time

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from engine.adapters.targets import Names, Overrides, Pattern, Targets
from engine.types import EngineError

NAMES = [
    f"{prefix}layers.{layer}.{path}"
    for prefix in ("model.", "language_model.model.")
    for layer in (0, 1, 10, 11)
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
PATTERNS = [
    "q_proj",
    "proj",
    "self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "^model.layers.1.self_attn.q_proj",
    "layers.1.*q_proj",
    "1.self_attn.q_proj",
    r"layers\.(0|10)\..*",
    r".*\.layers\.1\d\..*",
    r"[qv]_proj",
    "down_proj$",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_overrides_match_as_in_peft(pattern: str) -> None:
    values = {"never": 1, pattern: 2, ".*v_proj": 3}
    overrides = Overrides.of(values, "rank_pattern")
    for name in NAMES:
        assert overrides.value(name, 7) == values.get(get_pattern_key(list(values), name), 7), name


def test_an_exact_name_counts_where_no_pattern_matches() -> None:
    values = {"odd(name": 5}
    with pytest.raises(EngineError, match="no regular expression"):
        Overrides.of(values, "rank_pattern")
    assert Overrides((), values).value("odd(name", 1) == 5


LISTS = [
    ["q_proj"],
    ["self_attn.q_proj", "down_proj"],
    ["1.self_attn.q_proj"],
    ["model.layers.0.mlp.down_proj"],
    ["oj"],
]


@pytest.mark.parametrize("names", LISTS)
@pytest.mark.parametrize("exclude", [[], ["down_proj"], ["layers.0.self_attn.q_proj"]])
@pytest.mark.parametrize("layers", [None, [1, 10], [0]])
def test_lists_match_as_in_peft(names: list[str], exclude: list[str], layers: list[int] | None) -> None:
    config = LoraConfig(target_modules=names, exclude_modules=exclude or None, layers_to_transform=layers)
    targets = Targets(Names(tuple(names)), Names(tuple(exclude)), None if layers is None else frozenset(layers))
    for name in NAMES:
        layer = int(name.split("layers.")[1].split(".")[0])
        assert targets.cover(name, layer) is (check_target_module_exists(config, name) is True), name


@pytest.mark.parametrize("pattern", [*PATTERNS[:-1], r".*\.(q|v)_proj", r"^(?!.*layers\.1\.).*_proj"])
@pytest.mark.parametrize("exclude", [None, r".*layers\.0\..*"])
def test_patterns_match_as_in_peft(pattern: str, exclude: str | None) -> None:
    config = LoraConfig(target_modules=pattern, exclude_modules=exclude)
    excluded = Pattern(exclude, "exclude_modules") if exclude else Names(())
    targets = Targets(Pattern(pattern, "target_modules"), excluded)
    for name in NAMES:
        expected = bool(check_target_module_exists(config, name))
        assert targets.cover(name, 0) is expected, name


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<x>a)(?P<x>b)(", r"\1"])
def test_broken_patterns(pattern: str) -> None:
    with pytest.raises(EngineError, match=r"target_modules: the pattern .* is no regular expression"):
        Pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", ["a" * 5000, "((a{1000}){1000}){1000}", "(a{,99999}){99999}", "a{9999999999999}"])
def test_large_patterns_are_not_compiled(pattern: str) -> None:
    with pytest.raises(EngineError, match="is too large"):
        Pattern(pattern, "rank_pattern", suffix=True)


def test_matching_takes_bounded_time() -> None:
    pattern = Pattern("(a|a)*", "target_modules")
    start = time.monotonic()
    with pytest.raises(EngineError, match="takes too long to match"):
        pattern.matches("a" * 60 + "b")
    assert time.monotonic() - start < 5

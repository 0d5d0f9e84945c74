"""Reads adapter_config.json: what changes the mathematics is understood or refused by name, nothing is overlooked."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.adapters.spec import invalid
from engine.adapters.targets import ALL_LINEAR, Everything, Matcher, Names, Overrides, Pattern, Targets

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 2048

V = TypeVar("V")

UNDERSTOOD = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
    }
)
# Of no effect once an adapter is trained, or only together with a setting that is refused.
HARMLESS = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
    }
)
REFUSED = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "biases are not supported",
    "modules_to_save": "modules trained whole are not supported, only LoRA on the seven linear modules",
    "trainable_token_indices": "new or retrained tokens are not supported",
    "fan_in_fan_out": "transposed base weights are not supported",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "megatron_config": "Megatron layers are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA changes the base model's weights",
    "monteclora_config": "MonteCLoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}
UNKNOWN = "this server does not know the setting, so it cannot tell what it changes"
# Ways to start training that leave the base's weights as they are.
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What of the config decides the mathematics."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Overrides[int]
    alphas: Overrides[float]
    targets: Targets

    def rank_of(self, name: str) -> int:
        return self.ranks.value(name, self.rank)

    def scale_of(self, name: str, rank: int) -> float:
        return self.alphas.value(name, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def parse_settings(data: bytes) -> LoraSettings:
    """Raises EngineError (ADAPTER_INVALID) with the key, what it was expected to be and what was found."""
    raw = _load(data)
    _check_type(raw)
    for key, value in raw.items():
        if key not in UNDERSTOOD | HARMLESS and not _unset(value):
            raise _fault(key, REFUSED.get(key, UNKNOWN), value)
    _check_bias(raw.get("bias"))
    _check_init(raw.get("init_lora_weights"))
    return LoraSettings(
        rank=_rank(raw.get("r"), "r"),
        alpha=_number(raw.get("lora_alpha"), "lora_alpha"),
        rslora=_flag(raw.get("use_rslora"), "use_rslora"),
        ranks=_overrides(raw, "rank_pattern", _rank),
        alphas=_overrides(raw, "alpha_pattern", _number),
        targets=_targets(raw),
    )


def _load(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"adapter_config.json is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise invalid(f"adapter_config.json: expected an object, found {_show(raw)}")
    return raw


def _unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _check_type(raw: dict[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise _fault("peft_type", "expected 'LORA', the only type of adapter that is supported", kind)


def _check_bias(value: Any) -> None:
    if value not in (None, False, "none"):
        raise _fault("bias", "expected 'none', biases are not supported", value)


def _check_init(value: Any) -> None:
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in HARMLESS_INITS):
        return
    raise _fault(
        "init_lora_weights",
        "such training starts from a changed base model; convert the adapter to plain LoRA when saving it (PEFT: "
        "save_pretrained with path_initial_model_for_weight_conversion)",
        value,
    )


def _targets(raw: dict[str, Any]) -> Targets:
    if not raw.get("target_modules"):
        raise _fault(
            "target_modules", "expected names of modules, a pattern or 'all-linear'", raw.get("target_modules")
        )
    modules = _matcher(raw["target_modules"], "target_modules")
    return Targets(modules, _matcher(raw.get("exclude_modules") or [], "exclude_modules"), _layers(raw, modules))


def _matcher(value: Any, key: str) -> Matcher:
    if value == ALL_LINEAR and key == "target_modules":
        return Everything()
    if isinstance(value, str):
        return Pattern(value, key)
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _fault(key, "expected a list of names or a pattern", value)
    return Names(tuple(value))


def _layers(raw: dict[str, Any], modules: Matcher) -> frozenset[int] | None:
    value, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern")
    if value is None or value == []:
        return None
    if not isinstance(modules, Names):
        raise _fault("layers_to_transform", "PEFT takes it only together with a list of target_modules", value)
    if pattern not in (None, "", [], "layers") and not (isinstance(pattern, list) and "layers" in pattern):
        raise _fault("layers_pattern", "expected 'layers', the name of this model's list of layers", pattern)
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        raise _fault("layers_to_transform", "expected layer numbers", value)
    return frozenset(layers)


def _overrides(raw: dict[str, Any], key: str, number: Callable[[Any, str], V]) -> Overrides[V]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _fault(key, "expected an object from module patterns to numbers", value)
    if len(value) > MAX_PATTERNS:
        raise invalid(f"adapter_config.json: {key}: at most {MAX_PATTERNS} patterns are read, found {len(value)}")
    return Overrides.of({pattern: number(item, key) for pattern, item in value.items()}, key)


def _rank(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _fault(key, "expected a whole number of at least 1", value)
    return value


def _number(value: Any, key: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise _fault(key, "expected a finite number", value)


def _flag(value: Any, key: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _fault(key, "expected true or false", value)
    return bool(value)


def _fault(key: str, reason: str, found: Any) -> Exception:
    return invalid(f"adapter_config.json: {key}: {reason} (found {_show(found)})")


def _show(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."

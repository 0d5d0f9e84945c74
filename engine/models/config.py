"""A checkpoint's config.json as the decoder understands it: one shape, families as flags."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.dims import ModelDims

Json = Mapping[str, Any]


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something the decoder does not do; the message names it."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, llama3 or yarn; the rest are the parameters of these."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from the factor
    truncate: bool = True  # yarn: correction range rounded to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the decoder needs to know of a checkpoint."""

    architecture: str
    dims: ModelDims
    norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    dtype: str  # the checkpoint's
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # which layers see only the window; empty: none
    eos_token_ids: tuple[int, ...] = ()  # union of config.json and generation_config.json
    bos_token_id: int | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where the file is not."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path.name} is not a JSON object")
    return value


def parse_common(raw: Json, generation: Json = {}) -> ModelConfig:  # noqa: B006
    """What all families have in common; each family then sets its flags."""
    heads = int(raw["num_attention_heads"])
    dims = ModelDims(
        layers=int(raw["num_hidden_layers"]),
        hidden=int(raw["hidden_size"]),
        intermediate=int(raw["intermediate_size"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
        vocab=int(raw["vocab_size"]),
    )
    _check(raw, dims)
    return ModelConfig(
        architecture=raw["architectures"][0],
        dims=dims,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=parse_rope(raw),
        max_position=int(raw.get("max_position_embeddings", 2048)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=tuple(dict.fromkeys(_ids(raw.get("eos_token_id")) + _ids(generation.get("eos_token_id")))),
        bos_token_id=raw.get("bos_token_id"),
    )


def parse_rope(raw: Json) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    scaling: Json = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModelError(f"rope type {kind!r} is not supported")
    if (partial := float(scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {partial} is not supported")
    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise UnsupportedModelError("rope parameters mscale and mscale_all_dim are not supported")
    original = scaling.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    return RopeConfig(
        theta=float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        kind=kind,
        original_max_position=int(original or raw.get("max_position_embeddings", 2048)),
        truncate=bool(scaling.get("truncate", True)),
        **{name: float(scaling[name]) for name in names if scaling.get(name) is not None},
    )


def _check(raw: Json, dims: ModelDims) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {raw['hidden_act']!r} is not supported")
    if raw.get("quantization_config"):
        raise UnsupportedModelError("quantized checkpoints are not supported")
    if dims.head_dim % 4:
        raise UnsupportedModelError(f"head size {dims.head_dim} is not a multiple of 4")
    if dims.heads % dims.kv_heads:
        raise UnsupportedModelError(f"{dims.heads} heads do not divide into {dims.kv_heads} KV heads")


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)

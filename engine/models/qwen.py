"""The Qwen families' flags: Qwen2 has a bias on q, k and v; Qwen3 normalises q and k for each head."""

from dataclasses import replace

from engine.models.config import Json, ModelConfig


def qwen2(raw: Json, config: ModelConfig) -> ModelConfig:
    return _sliding(raw, replace(config, qkv_bias=True))


def qwen3(raw: Json, config: ModelConfig) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return _sliding(raw, replace(config, qk_norm=True, qkv_bias=bias, o_bias=bias))


def _sliding(raw: Json, config: ModelConfig) -> ModelConfig:
    """The window holds in the layers from `max_window_layers` on, or where `layer_types` says so."""
    window = raw.get("sliding_window")
    if window is None or not raw.get("use_sliding_window", False):
        return config
    layers, first = config.dims.layers, int(raw.get("max_window_layers", 0))
    types = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return replace(config, sliding_window=int(window), sliding_layers=tuple(t == "sliding_attention" for t in types))

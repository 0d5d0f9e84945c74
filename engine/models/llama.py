"""The Llama family's flags: Llama 2 and 3 and whatever calls itself LlamaForCausalLM (SmolLM2, TinyLlama, ...)."""

from dataclasses import replace

from engine.models.config import Json, ModelConfig


def llama(raw: Json, config: ModelConfig) -> ModelConfig:
    """`attention_bias` is a bias on all four projections, `mlp_bias` on the other three."""
    bias = bool(raw.get("attention_bias", False))
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)))

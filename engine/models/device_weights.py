"""A decoder's weights as plain tensors on the device, merged where one product serves several modules."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.weights import Progress, WeightSource, head_is_tied


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Tensor  # [hidden]
    qkv: Linear
    o: Linear
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear
    down: Linear
    qk_norms: tuple[Tensor, Tensor] | None  # each [head_dim]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embed: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; may be `embed`


def load_weights(config: ModelConfig, source: WeightSource, device: torch.device, progress: Progress) -> DecoderWeights:
    """Reads layer by layer, each tensor straight into its place, so that the host holds one of them at a time."""
    dims = config.dims
    embed = source.get("model.embed_tokens.weight", (dims.vocab, dims.hidden)).to(device)
    layers = []
    for index in range(dims.layers):
        layers.append(_load_layer(config, source, index, device))
        progress("weights", index + 1, dims.layers)
    norm = source.get("model.norm.weight", (dims.hidden,)).to(device)
    tied = head_is_tied(config, source)
    head = embed if tied else source.get("lm_head.weight", (dims.vocab, dims.hidden)).to(device)
    return DecoderWeights(embed, tuple(layers), norm, head)


def _load_layer(config: ModelConfig, source: WeightSource, index: int, device: torch.device) -> LayerWeights:
    dims, prefix = config.dims, f"model.layers.{index}."

    def merged(block: str, modules: tuple[str, ...], bias: bool) -> Linear:
        shapes = [dims.module_shape(module) for module in modules]
        names = [f"{prefix}{block}.{module}" for module in modules]
        weights = [(f"{name}.weight", (out, inn)) for name, (inn, out) in zip(names, shapes, strict=True)]
        biases = [(f"{name}.bias", (out,)) for name, (_, out) in zip(names, shapes, strict=True)]
        return Linear(_stack(source, weights, device), _stack(source, biases, device) if bias else None)

    def vector(name: str, size: int) -> Tensor:
        return source.get(f"{prefix}{name}.weight", (size,)).to(device)

    return LayerWeights(
        attention_norm=vector("input_layernorm", dims.hidden),
        qkv=merged("self_attn", ("q_proj", "k_proj", "v_proj"), config.qkv_bias),
        o=merged("self_attn", ("o_proj",), config.o_bias),
        mlp_norm=vector("post_attention_layernorm", dims.hidden),
        gate_up=merged("mlp", ("gate_proj", "up_proj"), config.mlp_bias),
        down=merged("mlp", ("down_proj",), config.mlp_bias),
        qk_norms=(vector("self_attn.q_norm", dims.head_dim), vector("self_attn.k_norm", dims.head_dim))
        if config.qk_norm
        else None,
    )


def _stack(source: WeightSource, parts: Sequence[tuple[str, tuple[int, ...]]], device: torch.device) -> Tensor:
    """The named tensors one below the other."""
    rows = sum(shape[0] for _, shape in parts)
    stacked: Tensor | None = None
    at = 0
    for name, shape in parts:
        tensor = source.get(name, shape)
        if stacked is None:
            stacked = torch.empty((rows, *shape[1:]), dtype=tensor.dtype, device=device)
        stacked[at : at + shape[0]].copy_(tensor)
        at += shape[0]
    assert stacked is not None
    return stacked

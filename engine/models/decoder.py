"""One decoder for every family that is understood: pre-norm layers, merged qkv and gate_up, families as flags.

The runner calls `forward`, then `logits` for the rows that need them. What differs by device is behind the two seams
it is given: `Attention` (stores and reads KV) and `LoraPath` (products with the batch's adapters).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.layers.activation import silu_and_mul
from engine.layers.embedding import Embedding, make_head
from engine.layers.linear import Product, make_product
from engine.layers.lora import DOWN, GATE_UP, OUT, QKV, LoraPath
from engine.layers.norm import RmsNorm
from engine.models.config import ModelConfig
from engine.models.weights import Progress, WeightSource, head_is_tied


class Attention(Protocol):
    """Attention over the arena. The runner prepares it once a step; layers call it."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[tokens, (heads + 2 kv_heads) * head_dim] -> [tokens, heads * head_dim]. Rotates; stores K and V."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: RmsNorm
    qkv: Product
    o: Product
    mlp_norm: RmsNorm
    gate_up: Product
    down: Product
    q_norm: RmsNorm | None = None
    k_norm: RmsNorm | None = None


class Decoder:
    """The base model's weights and the order in which a step uses them."""

    def __init__(
        self,
        config: ModelConfig,
        embed: Tensor,
        layers: list[DecoderLayer],
        norm: RmsNorm,
        head: Product,
    ) -> None:
        self.config = config
        self._embed = Embedding(embed)
        self._layers = layers
        self._norm = norm
        self._head = head

    def forward(self, ids: Tensor, attention: Attention, lora: LoraPath) -> Tensor:
        """[tokens] int64 -> hidden states before the last norm, [tokens, hidden]."""
        x = self._embed(ids)
        for index, layer in enumerate(self._layers):
            qkv = lora.product(index, QKV, layer.qkv, layer.attention_norm(x))
            self._normalise_heads(layer, qkv)
            x = lora.product(index, OUT, layer.o, attention(index, qkv), x)
            gate_up = lora.product(index, GATE_UP, layer.gate_up, layer.mlp_norm(x))
            x = lora.product(index, DOWN, layer.down, silu_and_mul(gate_up), x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] from `forward` -> [rows, vocab] float32."""
        return self._head(self._norm(hidden)).float()

    def _normalise_heads(self, layer: DecoderLayer, qkv: Tensor) -> None:
        """Normalises q and k inside the merged buffer, where the family does."""
        if layer.q_norm is None or layer.k_norm is None:
            return
        dims = self.config.dims
        heads = qkv.view(qkv.shape[0], dims.heads + 2 * dims.kv_heads, dims.head_dim)
        q, k = heads[:, : dims.heads], heads[:, dims.heads : dims.heads + dims.kv_heads]
        q.copy_(layer.q_norm(q))
        k.copy_(layer.k_norm(k))


def load_decoder(
    config: ModelConfig,
    source: WeightSource,
    device: torch.device,
    progress: Progress,
) -> Decoder:
    """Builds the decoder layer by layer, so that at most one is held twice."""
    dims = config.dims
    embed = source.get("model.embed_tokens.weight", (dims.vocab, dims.hidden)).to(device)
    layers = []
    for index in range(dims.layers):
        layers.append(_load_layer(config, source, index, device))
        progress("weights", index + 1, dims.layers)
    norm = RmsNorm(source.get("model.norm.weight", (dims.hidden,)).to(device), config.norm_eps)
    tied = head_is_tied(config, source)
    head = embed if tied else source.get("lm_head.weight", (dims.vocab, dims.hidden)).to(device)
    return Decoder(config, embed, layers, norm, make_head(head))


def _load_layer(config: ModelConfig, source: WeightSource, index: int, device: torch.device) -> DecoderLayer:
    dims, prefix = config.dims, f"model.layers.{index}."

    def merged(block: str, modules: tuple[str, ...], bias: bool) -> Product:
        names = [(f"{prefix}{block}.{module}", *dims.module_shape(module)) for module in modules]
        weight = torch.cat([source.get(f"{name}.weight", (out, inn)) for name, inn, out in names])
        biases = torch.cat([source.get(f"{name}.bias", (out,)) for name, _, out in names]).to(device) if bias else None
        return make_product(weight.to(device), biases)

    def norm(name: str, size: int) -> RmsNorm:
        return RmsNorm(source.get(f"{prefix}{name}.weight", (size,)).to(device), config.norm_eps)

    return DecoderLayer(
        attention_norm=norm("input_layernorm", dims.hidden),
        qkv=merged("self_attn", ("q_proj", "k_proj", "v_proj"), config.qkv_bias),
        o=merged("self_attn", ("o_proj",), config.o_bias),
        mlp_norm=norm("post_attention_layernorm", dims.hidden),
        gate_up=merged("mlp", ("gate_proj", "up_proj"), config.mlp_bias),
        down=merged("mlp", ("down_proj",), config.mlp_bias),
        q_norm=norm("self_attn.q_norm", dims.head_dim) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", dims.head_dim) if config.qk_norm else None,
    )

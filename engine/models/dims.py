"""The base model's shape as plain numbers, for whoever must not import torch."""

from dataclasses import dataclass

# The order is the module index of the piece table, on the host and in the kernels.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Sizes in elements; one decoder layer's modules all have these shapes in every layer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def module_shape(self, module: str) -> tuple[int, int]:
        """(in features, out features) of one of LORA_MODULES."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[module]

    def parameters(self, *, tied: bool) -> int:
        """Weights of the whole model, biases left out; `tied`: the head is the embedding."""
        linear = sum(i * o for i, o in map(self.module_shape, LORA_MODULES))
        norms = 2 * self.hidden
        return self.layers * (linear + norms) + self.hidden + self.vocab * self.hidden * (1 if tied else 2)

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim

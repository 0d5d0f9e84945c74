"""The gated activation between a decoder layer's merged gate_up and its down projection."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * intermediate] -> [tokens, intermediate]: silu(gate) * up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)

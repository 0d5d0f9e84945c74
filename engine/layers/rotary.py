"""Rotary position embedding over the q and k heads of a merged qkv buffer, with the families' scaling variants."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """([head_dim / 2] float32, factor of cosine and sine): how fast each pair turns, by the rope's kind."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / rope.theta**exponent
    match rope.kind:
        case "linear":
            return inverse / rope.factor, 1.0
        case "llama3":
            return _llama3(inverse, rope), 1.0
        case "yarn":
            scale = rope.attention_factor
            return _yarn(inverse, rope, head_dim), 0.1 * math.log(rope.factor) + 1.0 if scale is None else scale
        case _:
            return inverse, 1.0


def _llama3(inverse: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched by the factor, short ones are left, those between are blended."""
    turns = rope.original_max_position * inverse / (2 * math.pi)  # over the original context
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return inverse * (blend + (1.0 - blend) / rope.factor)


def _yarn(inverse: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Pairs that turn more than `beta_fast` times are left, fewer than `beta_slow` stretched, a ramp between."""

    def pair(turns: float) -> float:
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return inverse * ((1.0 - ramp) + ramp / rope.factor)


class Rotary:
    """Tables for every position up to the context's length; a step picks its rows once, layers only apply them.

    Behind the last position is a row that turns nothing.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        inverse, scale = inverse_frequencies(rope, head_dim)
        angle = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
        cos, sin = F.pad(angle.cos() * scale, (0, 0, 0, 1), value=1.0), F.pad(angle.sin() * scale, (0, 0, 0, 1))
        self.nowhere = positions  # the position of what is not turned
        self._cos = torch.cat([cos, cos], 1).to(device, dtype)  # [positions + 1, head_dim]
        self._sin = torch.cat([-sin, sin], 1).to(device, dtype)  # [positions + 1, head_dim]

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of heads at these positions; `positions` is [heads] int64."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def rotate(heads: Tensor, swapped: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns `heads` [heads, head_dim] in place; the halves of a head are the pairs, `swapped` has them exchanged."""
    heads.mul_(cos).addcmul_(swapped, sin)

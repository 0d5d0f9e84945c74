"""The rotary table that the kernels read."""

import torch
from torch import Tensor

from engine.layers.rotary import inverse_frequencies
from engine.models.config import RopeConfig


def rotary_table(rope: RopeConfig, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """[positions, head_dim] float32: cosines before sines, the family's scaling in both."""
    inverse, scale = inverse_frequencies(rope, head_dim)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
    return torch.cat([angle.cos() * scale, angle.sin() * scale], 1).to(device)

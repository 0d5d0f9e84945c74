"""The activations that the device decoder's launches read and write."""

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from kernels.launch import PRODUCT_PARTS, PRODUCT_ROWS


class DecoderBuffers:
    """Activations of the largest step; a smaller one uses the first rows.

    The residual stream is float32: rounded to bfloat16 after each of two sums a layer it is most of what moves a deep
    model's choices away from float32's, and at a row's width it costs next to nothing.
    """

    def __init__(self, config: ModelConfig, rows: int, samples: int, dtype: torch.dtype, device: torch.device) -> None:
        dims = config.dims
        query, key = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim

        def rows_of(width: int) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        self.residual = torch.zeros(rows, dims.hidden, dtype=torch.float32, device=device)
        self.last_residual = self.residual.new_zeros(samples, dims.hidden)
        self.hidden = rows_of(dims.hidden)
        self.qkv = rows_of(query + 2 * key)
        self.query = rows_of(query)
        self.mixed = rows_of(query)
        self.gate_up = rows_of(2 * dims.intermediate)
        self.active = rows_of(dims.intermediate)
        self._delta = rows_of(max(query + 2 * key, 2 * dims.intermediate, dims.hidden)).view(-1)
        self._parts = torch.zeros(
            PRODUCT_PARTS * min(rows, 2 * PRODUCT_ROWS) * dims.hidden, dtype=torch.float32, device=device
        )

    def parts(self, parts: int, rows: int) -> Tensor:
        """[parts, rows, hidden] of o's product or down's; read before the next are written."""
        return self._parts[: parts * rows * self.hidden.shape[1]].view(parts, rows, -1)

    def delta(self, rows: int, width: int) -> Tensor:
        """[rows, width]; one delta is read before the next is written."""
        return self._delta[: rows * width].view(rows, width)

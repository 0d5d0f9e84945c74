"""RMS normalisation over the last dimension."""

import torch.nn.functional as F
from torch import Tensor


class RmsNorm:
    """x / rms(x) * weight, computed in float32 within the product."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight  # [features]
        self._shape = (weight.shape[0],)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., features] -> the same."""
        return F.rms_norm(x, self._shape, self._weight, self._eps)

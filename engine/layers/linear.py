"""Matrix products with weights that never change, prepared once for the device that runs them.

On the CPU a weight is packed at load into the layout the product reads (oneDNN), and the bits of a row of the product
do not depend on the rows beside it, in float32 and bfloat16 alike. There is one exception: a single row of more than
`REDUCTION_BLOCK` features is added up in another order than several rows, so it is multiplied beside its own copy.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.packing import reorder

REDUCTION_BLOCK = 1024  # input features that are added up at one go; the sums of such blocks are added afterwards


class Product(Protocol):
    """x @ weight.T (+ bias) for one weight matrix."""

    out_features: int

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """[rows, in] -> [rows, out]; `addend` [rows, out] is added before the result is rounded."""
        ...


class PlainProduct:
    """The weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features = weight.shape[0]
        self._weight = weight  # [out, in]
        self._bias = bias  # [out]

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        y = F.linear(x, self._weight, self._bias)
        return y if addend is None else y.add_(addend)


class PackedProduct:
    """The weight in oneDNN's blocked layout, a copy by `pack`. Keeps no other."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: Callable[[Tensor], Tensor] = reorder) -> None:
        ops: Any = torch.ops.mkldnn
        self.out_features = weight.shape[0]
        self._weight = pack(weight)
        self._bias = bias
        self._plain = ops._linear_pointwise.default
        self._added = ops._linear_pointwise.binary
        self._pair_rows = weight.shape[1] > REDUCTION_BLOCK

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        if self._pair_rows and x.shape[0] == 1:
            return self._product(torch.cat((x, x)), None if addend is None else torch.cat((addend, addend)))[:1]
        return self._product(x, addend)

    def _product(self, x: Tensor, addend: Tensor | None) -> Tensor:
        if addend is None:
            return self._plain(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]
        return self._added(x, addend, self._weight, self._bias, "add")  # type: ignore[no-any-return]


def make_product(weight: Tensor, bias: Tensor | None = None, pack: Callable[[Tensor], Tensor] = reorder) -> Product:
    """The fastest form of the product that this build of torch has for the weight's device and dtype.

    Who makes many of few shapes gives a Packer's `pack`; the product is the same.
    """
    return PackedProduct(weight, bias, pack) if can_pack(weight) else PlainProduct(weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Packing is for the CPU, for float32 and for bfloat16 that the CPU multiplies natively."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu_has_bfloat16())


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))

"""What is to be fetched ahead of a product: pieces of its weight, for the kernel before it. Imports no triton."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.launch import cdiv, dependent

WARP = 32  # threads, each of which fetches a piece


@dataclass(frozen=True, slots=True)
class Ahead:
    """Pieces of a weight: `count` of `width` bytes each, `stride` bytes apart, from its first byte on."""

    weight: Tensor
    count: int
    width: int
    stride: int

    def programs(self, warps: int) -> int:
        """Programs of so many warps that fetch it all."""
        return cdiv(self.count, WARP * warps)


def ahead_rows(ahead: Ahead | None, warps: int, parts: int = 1) -> int:
    """Rows of `parts` programs of so many warps, behind a kernel's own, that fetch it all."""
    return 0 if ahead is None else cdiv(ahead.programs(warps), parts)


def overlapping(ahead: Ahead | None, warps: int, pdl: bool) -> dict[str, Any]:
    """Launch options of a kernel that may fetch ahead, and may start before the one ahead of it ends."""
    return {"LANES": WARP * warps if ahead else 0, "PDL": pdl, "num_warps": warps, **dependent(pdl)}


def ahead_arguments(ahead: Ahead | None, other: Tensor) -> tuple[Tensor, int, int, int]:
    """A kernel's arguments; where nothing is fetched, any tensor stands for the weight."""
    return (other, 0, 0, 0) if ahead is None else (ahead.weight, ahead.count, ahead.width, ahead.stride)


def rows_ahead(weight: Tensor, size: int, width: int = 1024) -> Ahead:
    """The first `size` bytes: the first output features whole."""
    total = min(size, weight.numel() * weight.element_size())
    return Ahead(weight, total // width, width, width)

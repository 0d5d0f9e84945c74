"""Weights on their way into the second-level cache while a small kernel runs: programs of its grid that fetch ahead.

The product that follows then starts at the cache's speed, not at memory's. Fetching changes no result.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, require

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


def ahead_arguments(ahead: Ahead | None, other: Tensor) -> tuple[Tensor, int, int, int]:
    """A kernel's arguments; where nothing is fetched, any tensor stands for the weight."""
    return (other, 0, 0, 0) if ahead is None else (ahead.weight, ahead.count, ahead.width, ahead.stride)


def rows_ahead(weight: Tensor, size: int, width: int = 1024) -> Ahead:
    """The first `size` bytes: the first output features whole."""
    total = min(size, weight.numel() * weight.element_size())
    return Ahead(weight, total // width, width, width)


def columns_ahead(weight: Tensor, size: int) -> Ahead:
    """About `size` bytes: the first input features of every output feature."""
    require(weight.is_contiguous(), "the weight must be contiguous")
    row = weight.shape[1] * weight.element_size()
    return Ahead(weight, weight.shape[0], min(row, max(128, size // weight.shape[0] // 128 * 128)), row)


@triton.jit
def fetch(weight, program, count, width, stride, LANES: tl.constexpr):
    """One program's pieces, one a thread. The widths are multiples of 16; nothing waits for what is fetched."""
    piece = program * LANES + tl.arange(0, LANES)
    address = weight.to(tl.int64, bitcast=True) + piece.to(tl.int64) * stride
    size = tl.where(piece < count, width, 0)
    tl.inline_asm_elementwise(
        """{
        .reg .pred real;
        setp.ne.u32 real, $2, 0;
        @real cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )

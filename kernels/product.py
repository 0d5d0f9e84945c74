"""A product of few rows with a weight that all multiprocessors read evenly.

At decode a product is the time its weight takes to be read. Here each multiprocessor has the same number of bytes to
read, and a launch that overlaps the one before it has its first bytes on their way when its input is ready.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.columns import load_columns
from kernels.fetch import fetch
from kernels.launch import dependent, kept, limited, multiprocessors, product_tiles, require, require_rows

AHEAD = 512  # bytes of each output feature's weights that are fetched before the input is there


@triton.jit(do_not_specialize=["rows"])
def _product(
    out,
    x,
    weight,
    x_tiles,
    weight_tiles,
    bias,
    features,
    inner,
    rows,
    programs,
    x_stride,
    out_stride,
    out_part,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: an equal share of the output features, one part of the inner dimension, all rows."""
    part = tl.program_id(0) % PARTS
    share = tl.program_id(0) // PARTS
    first = (share * features) // programs
    last = ((share + 1) * features) // programs
    i = tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    steps = tl.cdiv(inner, PARTS * BK)
    begin = part * steps * BK
    w_rows = weight + (first + i).to(tl.int64)[:, None] * inner
    x_rows = x + m[:, None] * x_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        fetch(
            weight + first.to(tl.int64) * inner + begin,
            last - first,
            AHEAD,
            inner * (weight.dtype.element_ty.primitive_bitwidth // 8),
            LANES,
        )
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    w_mask = (i < last - first)[:, None]
    x_mask = (m < rows)[:, None]
    for at in tl.range(begin, begin + steps * BK, BK, num_stages=STAGES):
        column = (at + k)[None, :]
        if TMA:  # what it loads beyond the share is not stored
            ww = weight_tiles.load([first, at])
            xx = x_tiles.load([0, at])
        else:
            ww = load_columns(w_rows, column, w_mask, inner, EVEN)
            xx = load_columns(x_rows, column, x_mask, inner, EVEN)
        acc = tl.dot(ww, tl.trans(xx), acc, input_precision="ieee")
    column = first + i
    if BIAS:
        here = column < tl.where(part == 0, last, 0)
        acc += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)[:, None]
    y = out + part.to(tl.int64) * out_part + m[:, None] * out_stride + column[None, :]
    mask = x_mask & (column < last)[None, :]
    tl.store(y, tl.trans(acc).to(out.dtype.element_ty), mask=mask, eviction_policy=KEEP)


def product_parts(weight: Tensor) -> int:
    """Parts of the inner dimension that a product with this weight [out, in], whose reader adds them up, is made in."""
    features, inner = weight.shape
    return product_tiles(1, features, inner, multiprocessors(weight.device), summed=True).parts


def product(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pdl: bool = False,
    keep: bool = False,
    shared: bool = False,
) -> None:
    """out = x @ weight.T (+ bias), rounded once.

    x: [tokens, in], rows contiguous; weight: [out, in] contiguous, of x's dtype; bias: [out]; out: [tokens, out], or
    [parts, tokens, out] with the parts of `product_parts`, whose sum is the product. pdl: starts before the one ahead
    of it has ended, fetches weights and waits then. shared: kernels of another stream are to find room beside it.

    Semantics: sum_p out[p, t, n] = sum_k x[t, k] * weight[n, k] (+ bias[n]).
    """
    require_rows(out, x, weight)
    require(x.dtype == weight.dtype and weight.is_contiguous(), "the weight is not contiguous or of another dtype")
    require(x.shape[1] == weight.shape[1] and out.shape[-1] == weight.shape[0], "x, weight and out do not fit")
    features, inner = weight.shape
    rows, summed = x.shape[0], out.dim() == 3
    tiles = product_tiles(
        rows, features, inner, multiprocessors(x.device), summed=summed, shared=shared, itemsize=x.element_size()
    )
    require(tiles.parts == (out.shape[0] if summed else 1), f"out does not hold {tiles.parts} parts")
    line = inner * x.element_size()
    whole = x, weight
    if tiles.tma:
        whole = (
            TensorDescriptor.from_tensor(x, [tiles.rows, tiles.inner]),
            TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.inner]),
        )
    _product[(tiles.programs * tiles.parts,)](
        out,
        x,
        weight,
        *whole,
        weight if bias is None else bias,
        features,
        inner,
        rows,
        tiles.programs,
        x.stride(0),
        out.stride(-2),
        out.stride(0) if summed else 0,
        BN=tiles.columns,
        BM=tiles.rows,
        BK=tiles.inner,
        PARTS=tiles.parts,
        STAGES=tiles.stages,
        EVEN=inner % (tiles.inner * tiles.parts) == 0,
        BIAS=bias is not None,
        LANES=tiles.columns,
        AHEAD=min(AHEAD, line) if line % 16 == 0 else 0,
        TMA=tiles.tma,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=tiles.warps,
        **limited(tiles.registers),
        **dependent(pdl),
    )

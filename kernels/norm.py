"""RMSNorm, alone and with the residual sum (and a LoRA delta) before it."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import Ahead, ahead_arguments, ahead_rows, overlapping
from kernels.fetch import fetch
from kernels.launch import power_of_two, require, require_rows
from kernels.lora_meta import LORA_ROWS


@triton.jit
def _row(
    row,
    out,
    x,
    residual,
    delta,
    counts,
    weight,
    eps,
    out_stride,
    x_stride,
    residual_stride,
    delta_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DELTA: tl.constexpr,
    PDL: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    real = i < SIZE
    w = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + i, mask=real, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * residual_stride + i, mask=real, other=0.0).to(tl.float32)
    if DELTA:
        lora = i < tl.where(row < tl.load(counts + ROWS), SIZE, 0)
        value += tl.load(delta + row * delta_stride + i, mask=lora, other=0.0).to(tl.float32)
    if RESIDUAL:
        tl.store(residual + row * residual_stride + i, value.to(residual.dtype.element_ty), mask=real)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    tl.store(out + row * out_stride + i, (value * scale * w).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "ahead_count"])
def _rms_norm(
    out,
    x,
    residual,
    delta,
    counts,
    weight,
    eps,
    out_stride,
    x_stride,
    residual_stride,
    delta_stride,
    rows,
    ahead,
    ahead_count,
    ahead_width,
    ahead_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DELTA: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row; those beyond the rows fetch ahead."""
    program = tl.program_id(0)
    if program < rows:
        _row(
            program.to(tl.int64), out, x, residual, delta, counts, weight, eps,
            out_stride, x_stride, residual_stride, delta_stride, SIZE, BLOCK, ROWS, RESIDUAL, DELTA, PDL,
        )  # fmt: skip
    elif LANES:
        fetch(ahead, program - rows, ahead_count, ahead_width, ahead_stride, LANES)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out, x: [tokens, size], rows contiguous, may be the same; weight: [size].

    Semantics: out[t, i] = x[t, i] / sqrt(mean_j x[t, j]^2 + eps) * weight[i], in float32, rounded once.
    """
    _launch(out, x, None, weight, eps, None, None)


def add_rms_norm(
    out: Tensor,
    residual: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    *,
    delta: Tensor | None = None,
    counts: Tensor | None = None,
    ahead: Ahead | None = None,
    pdl: bool = False,
) -> None:
    """out, residual, y, delta: [tokens, size], rows contiguous, each of its own dtype; out may be y. weight: [size].

    Semantics: s[t] = residual[t] + y[t] (+ delta[t] for t < counts[LORA_ROWS]); residual = s;
    out[t, i] = s[t, i] / sqrt(mean_j s[t, j]^2 + eps) * weight[i], from s before it is rounded.
    """
    _launch(out, y, residual, weight, eps, delta, counts, ahead, pdl)


def _launch(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    delta: Tensor | None,
    counts: Tensor | None,
    ahead: Ahead | None = None,
    pdl: bool = False,
) -> None:
    require_rows(out, x, weight)
    require(delta is None or counts is not None, "a delta needs the counts of its rows")
    require(out.shape == x.shape and x.shape[1] == weight.shape[0], "rows and weight differ in size")
    block, rows = power_of_two(x.shape[1]), x.shape[0]
    wide = residual is not None and residual.dtype == torch.float32  # more bytes a row: more loads under way at once
    warps = max(1, min(32, block // 128) if wide else min(16, block // 512))
    _rms_norm[(rows + ahead_rows(ahead, warps),)](
        out,
        x,
        x if residual is None else residual,
        x if delta is None else delta,
        x if counts is None else counts,
        weight,
        eps,
        out.stride(0),
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        x.stride(0) if delta is None else delta.stride(0),
        rows,
        *ahead_arguments(ahead, x),
        SIZE=x.shape[1],
        BLOCK=block,
        ROWS=LORA_ROWS,
        RESIDUAL=residual is not None,
        DELTA=delta is not None,
        **overlapping(ahead, warps, pdl),
    )

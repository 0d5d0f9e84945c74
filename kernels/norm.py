"""RMSNorm, alone and with the residual sum (and a LoRA delta) before it."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, kept, power_of_two, require, require_rows


@triton.jit
def _rms_norm(
    out,
    x,
    residual,
    delta,
    delta_rows,
    weight,
    eps,
    out_stride,
    x_stride,
    x_part,
    residual_stride,
    delta_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DELTA: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real = i < SIZE
    w = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    if DELTA:  # known before what is waited for
        lora = i < tl.where(row < tl.load(delta_rows), SIZE, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + i, mask=real, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + part * x_part + row * x_stride + i, mask=real, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * residual_stride + i, mask=real, other=0.0).to(tl.float32)
    if DELTA:
        value += tl.load(delta + row * delta_stride + i, mask=lora, other=0.0).to(tl.float32)
    if RESIDUAL:
        tl.store(
            residual + row * residual_stride + i, value.to(residual.dtype.element_ty), mask=real, eviction_policy=KEEP
        )
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    normed = (value * scale * w).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + i, normed, mask=real, eviction_policy=KEEP)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, *, keep: bool = False) -> None:
    """out, x: [tokens, size], rows contiguous, may be the same; weight: [size].

    Semantics: out[t, i] = x[t, i] / sqrt(mean_j x[t, j]^2 + eps) * weight[i], in float32, rounded once.
    """
    _launch(out, x, None, weight, eps, None, None, keep=keep)


def add_rms_norm(
    out: Tensor,
    residual: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    *,
    delta: Tensor | None = None,
    delta_rows: Tensor | None = None,
    pdl: bool = False,
    keep: bool = False,
) -> None:
    """out, residual, y, delta: [tokens, size], rows contiguous, each of its own dtype; out may be y. weight: [size].
    y: or [parts, tokens, size], whose sum over the parts is meant.

    Semantics: s[t] = residual[t] + y[t] (+ delta[t] for t < delta_rows[0]); residual = s;
    out[t, i] = s[t, i] / sqrt(mean_j s[t, j]^2 + eps) * weight[i], from s before it is rounded.
    """
    _launch(out, y, residual, weight, eps, delta, delta_rows, pdl=pdl, keep=keep)


def _launch(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    delta: Tensor | None,
    delta_rows: Tensor | None,
    *,
    pdl: bool = False,
    keep: bool,
) -> None:
    require_rows(out, x, weight)
    require(delta is None or delta_rows is not None, "a delta needs the number of its rows")
    require(out.shape == x.shape[-2:] and out.shape[1] == weight.shape[0], "rows and weight differ in size")
    (rows, size), parts = out.shape, x.shape[0] if x.dim() == 3 else 1
    block = power_of_two(size)
    wide = residual is not None and residual.dtype == torch.float32  # more bytes a row: more loads under way at once
    warps = max(1, min(32, block // 128) if wide else min(16, block // 512))
    _rms_norm[(rows,)](
        out,
        x,
        x if residual is None else residual,
        x if delta is None else delta,
        x if delta_rows is None else delta_rows,
        weight,
        eps,
        out.stride(0),
        x.stride(-2),
        x.stride(0),
        x.stride(-2) if residual is None else residual.stride(0),
        x.stride(-2) if delta is None else delta.stride(0),
        SIZE=size,
        BLOCK=block,
        PARTS=parts,
        RESIDUAL=residual is not None,
        DELTA=delta is not None,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=warps,
        **dependent(pdl),
    )

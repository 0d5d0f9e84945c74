"""SiLU of the gate times the up projection, with the LoRA delta of both."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, dependent, kept, require, require_rows

BLOCK, WARPS = 2048, 8


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up, in float32."""
    fall = tl.exp(-tl.abs(gate))  # never overflows
    return gate * up * tl.where(gate >= 0, 1.0, fall) / (1.0 + fall)


@triton.jit
def _silu_mul(
    out,
    gate_up,
    delta,
    delta_rows,
    size,
    out_stride,
    in_stride,
    delta_stride,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK columns of a row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = i < size
    source = gate_up + row * in_stride + i
    if DELTA:  # known before what is waited for
        lora = i < tl.where(row < tl.load(delta_rows), size, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.load(source, mask=real, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=real, other=0.0).to(tl.float32)
    if DELTA:
        more = delta + row * delta_stride + i
        gate += tl.load(more, mask=lora, other=0.0).to(tl.float32)
        up += tl.load(more + size, mask=lora, other=0.0).to(tl.float32)
    value = silu_times(gate, up)
    tl.store(out + row * out_stride + i, value.to(out.dtype.element_ty), mask=real, eviction_policy=KEEP)


def silu_mul(
    out: Tensor,
    gate_up: Tensor,
    *,
    delta: Tensor | None = None,
    delta_rows: Tensor | None = None,
    pdl: bool = False,
    keep: bool = False,
) -> None:
    """gate_up, delta: [tokens, 2 * size], gate before up; out: [tokens, size]; rows contiguous.

    Semantics: g[t] = gate_up[t] (+ delta[t] for t < delta_rows[0]); out[t, i] = silu(g[t, i]) * g[t, size + i].
    """
    require_rows(out, gate_up)
    require(delta is None or delta_rows is not None, "a delta needs the number of its rows")
    require(gate_up.shape[1] == 2 * out.shape[1], "gate_up is not twice as wide as out")
    rows, parts = out.shape[0], cdiv(out.shape[1], BLOCK)
    _silu_mul[(rows, parts)](
        out,
        gate_up,
        gate_up if delta is None else delta,
        gate_up if delta_rows is None else delta_rows,
        out.shape[1],
        out.stride(0),
        gate_up.stride(0),
        gate_up.stride(0) if delta is None else delta.stride(0),
        BLOCK=BLOCK,
        DELTA=delta is not None,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=WARPS,
        **dependent(pdl),
    )

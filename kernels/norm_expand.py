"""RMSNorm of the residual sum in steps of many tokens, whose LoRA delta is expanded on the way, never written."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, power_of_two, require, require_rows
from kernels.layout import piece_unit
from kernels.lora_expand import add_delta
from kernels.lora_meta import ITEM_INTS, LORA_ITEMS, LORA_MODULES, LORA_ROWS, LoraGroup, LoraMeta

ROWS_AT_ONCE, COLUMNS, WARPS = 16, 512, 8


@triton.jit(do_not_specialize=["first", "tokens"])
def _add_norm_expand(
    out,
    residual,
    y,
    weight,
    arena,
    z,
    counts,
    items,
    desc,
    first,
    tokens,
    eps,
    out_stride,
    residual_stride,
    y_stride,
    desc_stride,
    blocks,
    max_rank,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: BM rows of an item, or, beyond the items, of the base."""
    item = tl.program_id(1)
    count = tl.load(counts + ITEMS)
    lora = item < count
    base_row = tl.load(counts + ROWS) + (item - count) * TILE
    row = tl.where(lora, tl.load(items + item * ITEM_INTS, mask=lora, other=0), base_row)
    rows = tl.where(lora, tl.load(items + item * ITEM_INTS + 1, mask=lora, other=0), tokens - base_row)
    entry = desc + tl.where(lora, item, 0).to(tl.int64) * desc_stride + first * (1 + blocks)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    line = (row + i).to(tl.int64)
    real = i < tl.minimum(rows, TILE)
    o = tl.arange(0, BN)
    square = tl.zeros([BM], tl.float32)
    if tl.program_id(0) * BM < rows:
        for start in range(0, SIZE, BN):
            column = start + o
            mask = real[:, None] & (column < SIZE)[None, :]
            at = residual + line[:, None] * residual_stride + column[None, :]
            value = tl.load(y + line[:, None] * y_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if lora:
                value = add_delta(value, arena, z + line * max_rank, entry, column, real, SIZE, UNIT)
            tl.store(at, value.to(residual.dtype.element_ty), mask=mask)
            square += tl.sum(tl.where(mask, value * value, 0.0), 1)
        scale = tl.rsqrt(square / SIZE + eps)
        tl.debug_barrier()  # what this program's threads stored is read by others of them
        for start in range(0, SIZE, BN):
            column = start + o
            mask = real[:, None] & (column < SIZE)[None, :]
            w = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
            value = tl.load(residual + line[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
            value = value.to(tl.float32) * scale[:, None] * w[None, :]
            at = out + line[:, None] * out_stride + column[None, :]
            tl.store(at, value.to(out.dtype.element_ty), mask=mask)


def add_rms_norm_expand(
    out: Tensor,
    residual: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    arena: Tensor,
    meta: LoraMeta,
    layer: int,
    group: LoraGroup,
) -> None:
    """out, residual, y: [tokens, size], rows contiguous; out may be y. weight: [size].

    Follows lora_shrink of the same group, in a bucket whose items are larger than a decode's.

    Semantics: as add_rms_norm with lora_expand's delta, but the norm is taken of the sum as it is stored.
    """
    require_rows(out, residual, y, weight)
    require(out.dtype == arena.dtype, "rows and the arena differ in dtype")
    size, bounds = weight.shape[0], meta.bounds
    require(out.shape == y.shape and group.features == (size,) and y.shape[1] == size, "rows and weight differ in size")
    require(bounds.tile > 16, "a decode's shrink splits its products: expand them first")
    _add_norm_expand[(cdiv(bounds.tile, ROWS_AT_ONCE), bounds.items + 1)](
        out,
        residual,
        y,
        weight,
        arena,
        meta.z,
        meta.counts,
        meta.items,
        meta.expand_desc,
        layer * LORA_MODULES + group.first,
        out.shape[0],
        eps,
        out.stride(0),
        residual.stride(0),
        y.stride(0),
        meta.expand_desc.stride(0),
        bounds.rank_blocks,
        meta.max_rank,
        SIZE=size,
        UNIT=piece_unit(arena.element_size()),
        ITEMS=LORA_ITEMS,
        ROWS=LORA_ROWS,
        ITEM_INTS=ITEM_INTS,
        TILE=bounds.tile,
        BM=ROWS_AT_ONCE,
        BN=min(COLUMNS, power_of_two(size)),
        num_warps=WARPS,
    )

"""SiLU of the gate times the up projection in steps of many tokens, whose LoRA delta is expanded on the way.

The delta of a prefill is as large as the product: kept in registers, it is neither written nor read again.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, require, require_rows
from kernels.layout import piece_unit
from kernels.lora_expand import add_delta
from kernels.lora_meta import ITEM_INTS, LORA_ITEMS, LORA_MODULES, LORA_ROWS, LoraGroup, LoraMeta

ROWS_AT_ONCE, COLUMNS, WARPS = 64, 128, 8


@triton.jit(do_not_specialize=["first", "tokens"])
def _silu_mul_expand(
    out,
    gate_up,
    arena,
    z,
    counts,
    items,
    desc,
    first,
    tokens,
    size,
    out_stride,
    in_stride,
    desc_stride,
    blocks,
    max_rank,
    UNIT: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: BN columns of one item's rows, or, beyond the items, of as many rows of the base."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    item = tl.program_id(1)
    count = tl.load(counts + ITEMS)
    lora = item < count
    base_row = tl.load(counts + ROWS) + (item - count) * TILE
    row = tl.where(lora, tl.load(items + item * ITEM_INTS, mask=lora, other=0), base_row)
    rows = tl.where(lora, tl.load(items + item * ITEM_INTS + 1, mask=lora, other=0), tokens - base_row)
    entry = desc + tl.where(lora, item, 0).to(tl.int64) * desc_stride + first * (1 + blocks)
    for start in range(0, tl.minimum(rows, TILE), BM):
        i = start + tl.arange(0, BM)
        line = (row + i).to(tl.int64)
        mask = (i < rows)[:, None] & (column < size)[None, :]
        source = gate_up + line[:, None] * in_stride + column[None, :]
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + size, mask=mask, other=0.0).to(tl.float32)
        if lora:
            zz = z + line * (2 * max_rank)
            gate = add_delta(gate, arena, zz, entry, column, i < rows, size, UNIT)
            up = add_delta(up, arena, zz + max_rank, entry + (1 + blocks), column, i < rows, size, UNIT)
        fall = tl.exp(-tl.abs(gate))  # never overflows
        value = gate * up * tl.where(gate >= 0, 1.0, fall) / (1.0 + fall)
        tl.store(out + line[:, None] * out_stride + column[None, :], value.to(out.dtype.element_ty), mask=mask)


def silu_mul_expand(out: Tensor, gate_up: Tensor, arena: Tensor, meta: LoraMeta, layer: int, group: LoraGroup) -> None:
    """gate_up: [tokens, 2 * size], gate before up; out: [tokens, size]; rows contiguous, in the arena's dtype.

    Follows lora_shrink of the same group, in a bucket whose items are larger than a decode's.

    Semantics: g[t] = gate_up[t] + delta[t], delta as lora_expand's, nothing for rows of the base;
    out[t, i] = silu(g[t, i]) * g[t, size + i].
    """
    require_rows(out, gate_up)
    require(out.dtype == gate_up.dtype == arena.dtype, "out, gate_up and the arena differ in dtype")
    size, bounds = out.shape[1], meta.bounds
    require(gate_up.shape[1] == 2 * size and group.features == (size, size), "gate_up is not twice as wide as out")
    require(bounds.tile > 16, "a decode's shrink splits its products: expand them first")
    narrow = 2 if out.element_size() == 4 else 1
    columns = COLUMNS // narrow
    _silu_mul_expand[(cdiv(size, columns), bounds.items + 1)](
        out,
        gate_up,
        arena,
        meta.z,
        meta.counts,
        meta.items,
        meta.expand_desc,
        layer * LORA_MODULES + group.first,
        out.shape[0],
        size,
        out.stride(0),
        gate_up.stride(0),
        meta.expand_desc.stride(0),
        bounds.rank_blocks,
        meta.max_rank,
        UNIT=piece_unit(arena.element_size()),
        ITEMS=LORA_ITEMS,
        ROWS=LORA_ROWS,
        ITEM_INTS=ITEM_INTS,
        TILE=bounds.tile,
        BM=min(ROWS_AT_ONCE, bounds.tile),
        BN=columns,
        num_warps=WARPS,
    )

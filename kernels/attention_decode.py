"""Decode attention over the arena: each span of a sequence's keys is one program's; the last to end combines them."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_meta import DECODE_INTS, AttentionMeta
from kernels.launch import decode_tiles, power_of_two, require, require_rows
from kernels.layout import KvLayout
from kernels.lora_meta import DECODE_ITEMS


@triton.jit
def _item(items, item, mask, ITEM_INTS: tl.constexpr):
    """Row of q, block table's row, first key, end of keys, first item of the sequence, its items."""
    at = items + item * ITEM_INTS
    return (
        tl.load(at, mask=mask, other=0).to(tl.int64),
        tl.load(at + 1, mask=mask, other=0).to(tl.int64),
        tl.load(at + 2, mask=mask, other=0),
        tl.load(at + 3, mask=mask, other=0),
        tl.load(at + 4, mask=mask, other=0),
        tl.load(at + 5, mask=mask, other=0),
    )


@triton.jit
def _combine(
    partial,
    partial_lse,
    line,
    parts,
    real,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """The spans of one sequence and KV head, in their order; other programs wrote them: read past the L1."""
    g = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc = tl.zeros([BM, BD], tl.float32)
    most = tl.full([BM], -1.0e30, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    for _ in range(parts):
        lse = tl.load(partial_lse + line, mask=g < GROUP, other=0.0, cache_modifier=".cg")
        value = tl.load(partial + line[:, None] * HEAD_DIM + d[None, :], mask=real, other=0.0, cache_modifier=".cg")
        high = tl.maximum(most, lse)
        fade = tl.exp2(most - high)
        weight = tl.exp2(lse - high)
        norm = norm * fade + weight
        acc = acc * fade[:, None] + value * weight[:, None]
        most = high
        line += KV_HEADS * GROUP
    return acc / norm[:, None]


@triton.jit
def _decode(
    out,
    q,
    arena,
    counts,
    items,
    tables,
    partial,
    partial_lse,
    arrived,
    out_stride,
    q_stride,
    table_stride,
    chunk_elements,
    layer_start,
    scale,
    ITEMS: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One program: one KV head's query group against one span of keys. scale includes log2(e).

    The program that ends last of a sequence's combines them, always in the same order. An item is read before the
    list's length is known (the list is never shorter than the grid), so that the two loads do not wait for another.
    """
    kv_head = tl.program_id(0)
    g = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    real = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    head = kv_head * GROUP + g
    keys = arena + layer_start + kv_head * (BLOCK_TOKENS * HEAD_DIM)
    values = keys + KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    at = (head * HEAD_DIM)[:, None] + d[None, :]
    start = tl.program_id(1)
    row, table_row, begin, end, first_item, parts = _item(items, start, True, ITEM_INTS)
    total = tl.load(counts + ITEMS)
    for item in range(start, total, tl.num_programs(1)):
        table = tables + table_row * table_stride
        query = tl.load(q + row * q_stride + at, mask=real, other=0.0)
        acc = tl.zeros([BM, BD], tl.float32)
        most = tl.full([BM], float("-inf"), tl.float32)
        norm = tl.zeros([BM], tl.float32)
        for first in range(begin, end, BN):
            token = first + n
            block = tl.load(table + token // BLOCK_TOKENS, mask=token < end, other=0).to(tl.int64)
            place = block * chunk_elements + (token % BLOCK_TOKENS) * HEAD_DIM
            kv_mask = (token < end)[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(keys + place[:, None] + d[None, :], mask=kv_mask, other=0.0)
            v = tl.load(values + place[:, None] + d[None, :], mask=kv_mask, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            score = tl.where((token < end)[None, :], score, float("-inf"))
            high = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score - high[:, None])
            fade = tl.exp2(most - high)
            norm = norm * fade + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            most = high
        acc = acc / norm[:, None]
        if parts > 1:
            line = tl.cast(item, tl.int64) * (KV_HEADS * GROUP) + head
            tl.store(partial + line[:, None] * HEAD_DIM + d[None, :], acc, mask=real)
            tl.store(partial_lse + line, most + tl.log2(norm), mask=g < GROUP)
            tl.debug_barrier()
            counter = arrived + tl.cast(first_item, tl.int64) * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
                tl.store(counter, 0)
                line = tl.cast(first_item, tl.int64) * (KV_HEADS * GROUP) + head
                acc = _combine(
                    partial, partial_lse, line, parts, real, GROUP, KV_HEADS, HEAD_DIM, BM, BD
                )  # fmt: skip
                tl.store(out + row * out_stride + at, acc.to(out.dtype.element_ty), mask=real)
        else:
            tl.store(out + row * out_stride + at, acc.to(out.dtype.element_ty), mask=real)
        after = item + tl.num_programs(1)
        row, table_row, begin, end, first_item, parts = _item(items, after, after < total, ITEM_INTS)


def decode_attention(
    out: Tensor, q: Tensor, arena: Tensor, layout: KvLayout, layer: int, meta: AttentionMeta, scale: float
) -> None:
    """Attention of the step's decodes: one new token each, over everything cached (or the window that was packed).

    out, q: [tokens, heads * head_dim], rows contiguous, in the arena's dtype. Rows of prefills and tails are not
    written.

    Semantics: for head h of KV head g = h // (heads // kv_heads), and row t of a sequence whose keys are j,
    out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, g]) v[j, g].
    """
    require_rows(out, q, arena)
    require(q.dtype == arena.dtype, "q and the arena differ in dtype")
    heads = q.shape[1] // layout.head_dim
    require(heads % layout.kv_heads == 0, f"{heads} heads over {layout.kv_heads} KV heads are not supported")
    group = heads // layout.kv_heads
    tiles = decode_tiles(group, layout.head_dim, q.element_size())
    wide = power_of_two(layout.head_dim)
    _decode[(layout.kv_heads, meta.bounds.decode_grid)](
        out,
        q,
        arena,
        meta.counts,
        meta.decode_items,
        meta.block_tables,
        meta.partial,
        meta.partial_lse,
        meta.arrived,
        out.stride(0),
        q.stride(0),
        meta.block_tables.stride(0),
        arena.stride(0),
        layer * layout.layer_elements,
        scale * math.log2(math.e),
        ITEMS=DECODE_ITEMS,
        ITEM_INTS=DECODE_INTS,
        KV_HEADS=layout.kv_heads,
        GROUP=group,
        HEAD_DIM=layout.head_dim,
        BLOCK_TOKENS=layout.block_tokens,
        BM=tiles.rows,
        BN=tiles.keys,
        BD=wide,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )

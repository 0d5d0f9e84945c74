"""Prefill attention over the arena: causal, of new tokens over cached prefixes, earlier chunks and themselves."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_meta import PREFILL_INTS, AttentionMeta
from kernels.launch import power_of_two, prefill_tiles, q_tile, require, require_rows
from kernels.layout import KvLayout
from kernels.lora_meta import PREFILL_ITEMS


@triton.jit
def _prefill(
    out,
    q,
    arena,
    counts,
    items,
    tables,
    out_stride,
    q_stride,
    table_stride,
    chunk_elements,
    layer_start,
    scale,
    window,
    ITEMS: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program: the query group of one KV head for a tile of tokens. scale includes log2(e).

    Block ids are carried from tile to tile: loaded where they are used they would take stages of the loop's pipeline,
    and of two or three stages no tile of keys would be under way.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    owner = tl.load(items + item * ITEM_INTS)
    row = tl.load(items + item * ITEM_INTS + 1)
    tokens = tl.load(items + item * ITEM_INTS + 2)
    first_position = tl.load(items + item * ITEM_INTS + 3)
    if item < tl.load(counts + ITEMS):
        table = tables + owner.to(tl.int64) * table_stride
        i = tl.arange(0, BM)
        d = tl.arange(0, BD)
        n = tl.arange(0, BN)
        token = i // GROUP
        real = (token < tokens)[:, None] & (d < HEAD_DIM)[None, :]
        at = ((kv_head * GROUP + i % GROUP) * HEAD_DIM)[:, None] + d[None, :]
        line = (row + token).to(tl.int64)[:, None]
        end = first_position + tokens
        begin = 0
        if WINDOW:
            begin = tl.maximum(0, first_position - window + 1) // BN * BN
        near = table + n // BLOCK_TOKENS
        block = tl.load(near + begin // BLOCK_TOKENS, mask=begin + n < end, other=0)
        query = tl.load(q + line * q_stride + at, mask=real, other=0.0)
        position = first_position + token
        keys = arena + layer_start + kv_head * (BLOCK_TOKENS * HEAD_DIM)
        values = keys + KV_HEADS * BLOCK_TOKENS * HEAD_DIM
        inside = (n % BLOCK_TOKENS * HEAD_DIM)[:, None] + d[None, :]
        acc = tl.zeros([BM, BD], tl.float32)
        most = tl.full([BM], -1.0e30, tl.float32)
        norm = tl.zeros([BM], tl.float32)
        for first in range(begin, end, BN):
            start = block.to(tl.int64)[:, None] * chunk_elements + inside
            if BLOCK_TOKENS > BN:
                start += first % BLOCK_TOKENS * HEAD_DIM
            key = first + n
            there = (key < end)[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(keys + start, mask=there, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee")
            if WINDOW:
                seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
                score = tl.where(seen, score, float("-inf"))
            elif first + BN > first_position + 1:  # else every row sees the tile
                score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
            high = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score * scale - (high * scale)[:, None])
            fade = tl.exp2((most - high) * scale)
            norm = norm * fade + tl.sum(weight, 1)
            v = tl.load(values + start, mask=there, other=0.0)
            acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            most = high
            block = tl.load(near + (first + BN) // BLOCK_TOKENS, mask=key + BN < end, other=0)
        acc *= (1.0 / tl.where(norm > 0, norm, 1.0))[:, None]  # rows beyond the tile's tokens may see no key
        tl.store(out + line * out_stride + at, acc.to(out.dtype.element_ty), mask=real)


def prefill_attention(
    out: Tensor,
    q: Tensor,
    arena: Tensor,
    layout: KvLayout,
    layer: int,
    meta: AttentionMeta,
    scale: float,
    window: int = 0,
    *,
    long: bool = False,
) -> None:
    """Attention of the step's prefills: two new tokens or more each, whose keys and values are already stored.

    long: some of them have thousands of keys; chooses tiles only.

    out, q: [tokens, heads * head_dim], rows contiguous, in the arena's dtype. Rows of decodes and tails are not
    written.

    Semantics: row t at position p of its sequence, head h of KV head g = h // (heads // kv_heads):
    out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, g]) v[j, g] over keys j from max(0, p - window + 1) (0 where
    window is 0) to p.
    """
    require_rows(out, q, arena)
    require(q.dtype == arena.dtype, "q and the arena differ in dtype")
    heads = q.shape[1] // layout.head_dim
    tile = q_tile(heads, layout.kv_heads, layout.head_dim, q.element_size())
    require(meta.bounds.q_tile == tile, f"items were packed for {meta.bounds.q_tile} tokens, the kernel takes {tile}")
    tiles = prefill_tiles(layout.head_dim, q.element_size(), long)
    _prefill[(layout.kv_heads, meta.bounds.prefill_items)](
        out,
        q,
        arena,
        meta.counts,
        meta.prefill_items,
        meta.block_tables,
        out.stride(0),
        q.stride(0),
        meta.block_tables.stride(0),
        arena.stride(0),
        layer * layout.layer_elements,
        scale * math.log2(math.e),
        window,
        ITEMS=PREFILL_ITEMS,
        ITEM_INTS=PREFILL_INTS,
        KV_HEADS=layout.kv_heads,
        GROUP=heads // layout.kv_heads,
        HEAD_DIM=layout.head_dim,
        BLOCK_TOKENS=layout.block_tokens,
        BM=tiles.rows,
        BN=tiles.keys,
        BD=power_of_two(layout.head_dim),
        WINDOW=window > 0,
        maxnreg=tiles.registers,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )

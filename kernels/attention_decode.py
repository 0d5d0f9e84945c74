"""Decode attention over the arena: each span of a sequence's keys is one program's, then the spans are combined."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention_meta import DECODE_INTS, SEQUENCE_INTS, AttentionMeta
from kernels.launch import (
    cdiv,
    decode_tiles,
    dependent,
    has_tma,
    kept,
    multiprocessors,
    power_of_two,
    require,
    require_rows,
)
from kernels.layout import KvLayout
from kernels.lora_meta import DECODE_ITEMS, DECODE_SEQUENCES


@triton.jit
def _add_keys(k, v, query, seen, scale, acc, most, norm):
    """Some more keys. k, v: [keys, BD]; query: [BM, BD]; seen: [keys]; acc: [BD, BM]; most: [BM]; norm: [keys, BM].

    Keys fill the matrix units' 16 rows, a group's queries need not fill their 8 columns. The end sums norm over keys.
    """
    score = tl.dot(k, tl.trans(query), input_precision="ieee") * scale
    score = tl.where(seen[:, None], score, float("-inf"))
    high = tl.maximum(most, tl.max(score, 0))
    weight = tl.exp2(score - high[None, :])
    fade = tl.exp2(most - high)
    acc = tl.dot(tl.trans(v), weight.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    return acc, high, norm * fade[None, :] + weight


@triton.jit
def _decode(
    out,
    q,
    arena,
    arena_tiles,
    counts,
    items,
    tables,
    partial,
    partial_lse,
    out_stride,
    q_stride,
    table_stride,
    chunk_lines,
    layer_line,
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
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one KV head's query group against one span of keys. scale includes log2(e).

    A line is one head's key or value of one token; BN of them in a block are a tile, which comes whole (TMA) where it
    can. What follows a sequence's last token in its tile may be anything, so the last tile of a span is read line by
    line, ahead of the others, and used behind them.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PER: tl.constexpr = BLOCK_TOKENS // BN
    kv_head = tl.program_id(0)
    g = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    real = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    head = kv_head * GROUP + g
    key_line = layer_line + kv_head * BLOCK_TOKENS
    value_lines = KV_HEADS * BLOCK_TOKENS  # from a key's to its value's
    # The first item is read before anything else is known (the list is never shorter than the grid). Later ones are
    # read in their own turn: triton 3.6 keeps the first value where a bound of the inner loop is carried between turns.
    own = tl.program_id(1)
    total = tl.load(counts + ITEMS)
    first_item = items + own * ITEM_INTS
    first_row = tl.load(first_item)
    first_place = tl.load(first_item + 1).to(tl.int64)
    first_begin = tl.load(first_item + 2)
    first_end = tl.load(first_item + 3)
    first_whole = tl.load(first_item + 4)
    first_table = tables + first_place * table_stride
    first_block = tl.load(first_table + first_begin // BLOCK_TOKENS, mask=own < total, other=0)
    first_last = tl.load(first_table + (first_end - 1) // BLOCK_TOKENS, mask=own < total, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for item in range(own, total, tl.num_programs(1)):
        later = tl.cast(item, tl.int32) > own
        entry = items + item * ITEM_INTS
        row = tl.where(later, tl.load(entry, mask=later, other=0), first_row).to(tl.int64)
        place = tl.where(later, tl.load(entry + 1, mask=later, other=0).to(tl.int64), first_place)
        begin = tl.where(later, tl.load(entry + 2, mask=later, other=0), first_begin)
        end = tl.where(later, tl.load(entry + 3, mask=later, other=0), first_end)
        whole = tl.where(later, tl.load(entry + 4, mask=later, other=0), first_whole)
        table = tables + place * table_stride
        last = (end - 1) // BN
        block = tl.where(later, tl.load(table + begin // BLOCK_TOKENS, mask=later, other=0), first_block)
        last_block = tl.where(later, tl.load(table + (end - 1) // BLOCK_TOKENS, mask=later, other=0), first_last)
        token = last * BN + n
        lines = last_block.to(tl.int64) * chunk_lines + key_line + token % BLOCK_TOKENS
        last_keys = arena + lines[:, None] * HEAD_DIM + d[None, :]
        held = (token < end)[:, None] & (d < HEAD_DIM)[None, :]
        last_k = tl.load(last_keys, mask=held, other=0.0)
        last_v = tl.load(last_keys + value_lines * HEAD_DIM, mask=held, other=0.0)
        at = (head * HEAD_DIM)[:, None] + d[None, :]
        query = tl.load(q + row * q_stride + at, mask=real, other=0.0)
        acc = tl.zeros([BD, BM], tl.float32)
        most = tl.full([BM], float("-inf"), tl.float32)
        norm = tl.zeros([BN, BM], tl.float32)
        for tile in tl.range(begin // BN, last, num_stages=STAGES):
            within = key_line + tile % PER * BN
            if TMA:
                k = arena_tiles.load([block * chunk_lines + within, 0])
                v = arena_tiles.load([block * chunk_lines + within + value_lines, 0])
            else:
                at_key = (block.to(tl.int64) * chunk_lines + within + n)[:, None] * HEAD_DIM + d[None, :]
                k = tl.load(arena + at_key, mask=(d < HEAD_DIM)[None, :], other=0.0)
                v = tl.load(arena + at_key + value_lines * HEAD_DIM, mask=(d < HEAD_DIM)[None, :], other=0.0)
            block = tl.load(table + (tile + 1) // PER)
            acc, most, norm = _add_keys(k, v, query, tile * BN + n >= begin, scale, acc, most, norm)
        # They pass through an operation: Triton would wait for bare loads where they stand.
        last_k = tl.where(held, last_k, 0.0)
        last_v = tl.where(held, last_v, 0.0)
        seen = (token >= begin) & (token < end)
        acc, most, norm = _add_keys(last_k, last_v, query, seen, scale, acc, most, norm)
        sums = tl.sum(norm, 0)
        result = tl.trans(acc / sums[None, :])
        if whole > 0:
            tl.store(out + row * out_stride + at, result.to(out.dtype.element_ty), mask=real, eviction_policy=KEEP)
        else:
            part = tl.cast(item, tl.int64) * (KV_HEADS * GROUP) + head
            tl.store(partial + part[:, None] * HEAD_DIM + d[None, :], result, mask=real, eviction_policy=KEEP)
            tl.store(partial_lse + part, most + tl.log2(sums), mask=g < GROUP, eviction_policy=KEEP)


@triton.jit
def _combine(
    out,
    counts,
    sequences,
    partial,
    partial_lse,
    out_stride,
    SEQUENCES: tl.constexpr,
    SEQUENCE_INTS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one head of one sequence, BS spans at a time."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    index = tl.program_id(1)
    s = tl.arange(0, BS)
    d = tl.arange(0, BD)
    first = tl.load(sequences + index * SEQUENCE_INTS + 1)
    spans = tl.load(sequences + index * SEQUENCE_INTS + 2)
    row = tl.load(sequences + index * SEQUENCE_INTS).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (index < tl.load(counts + SEQUENCES)) & (spans > 1):
        acc = tl.zeros([BD], tl.float32)
        most = -float("inf")
        norm = 0.0
        for at in range(0, spans, BS):
            line = (first + at + s).to(tl.int64) * HEADS + head
            mask = at + s < spans
            lse = tl.load(partial_lse + line, mask=mask, other=float("-inf"))
            part_mask = mask[:, None] & (d < HEAD_DIM)[None, :]
            part = tl.load(partial + line[:, None] * HEAD_DIM + d[None, :], mask=part_mask, other=0.0)
            high = tl.maximum(most, tl.max(lse, 0))
            weight = tl.exp2(lse - high)
            fade = tl.exp2(most - high)
            norm = norm * fade + tl.sum(weight, 0)
            acc = acc * fade + tl.sum(part * weight[:, None], 0)
            most = high
        y = out + row * out_stride + head * HEAD_DIM + d
        tl.store(y, (acc / norm).to(out.dtype.element_ty), mask=d < HEAD_DIM, eviction_policy=KEEP)


def decode_attention(
    out: Tensor,
    q: Tensor,
    arena: Tensor,
    layout: KvLayout,
    layer: int,
    meta: AttentionMeta,
    scale: float,
    *,
    pdl: bool = False,
    keep: bool = False,
    each: int = 0,
) -> None:
    """Attention of the step's decodes: one new token each, over everything cached (or the window that was packed).

    each: programs a multiprocessor at most, where another kernel is to find room beside them; 0: as many as there are.

    out, q: [tokens, heads * head_dim], rows contiguous, in the arena's dtype. Rows of prefills and tails are not
    written.

    Semantics: for head h of KV head g = h // (heads // kv_heads), and row t of a sequence whose keys are j,
    out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, g]) v[j, g].
    """
    require_rows(out, q, arena)
    require(arena.is_contiguous() and arena.stride(0) % layout.head_dim == 0, "a chunk does not hold whole heads")
    require(q.dtype == arena.dtype, "q and the arena differ in dtype")
    heads = q.shape[1] // layout.head_dim
    require(heads % layout.kv_heads == 0, f"{heads} heads over {layout.kv_heads} KV heads are not supported")
    group = heads // layout.kv_heads
    grid = meta.bounds.decode_grid
    if each:
        grid = min(grid, cdiv(each * multiprocessors(q.device), layout.kv_heads))
    programs = layout.kv_heads * grid
    tiles = decode_tiles(group, layout.head_dim, q.element_size(), programs / multiprocessors(q.device))
    require(layout.block_tokens % tiles.keys == 0, f"blocks of {layout.block_tokens} tokens are not supported")
    wide = power_of_two(layout.head_dim)
    lines = arena.numel() // layout.head_dim
    tma = has_tma(q.device) and layout.head_dim * q.element_size() % 16 == 0 and lines < 2**31
    shape, strides = [lines, layout.head_dim], [layout.head_dim, 1]
    _decode[(layout.kv_heads, grid)](
        out,
        q,
        arena,
        TensorDescriptor(arena, shape, strides, [tiles.keys, wide]) if tma else arena,
        meta.counts,
        meta.decode_items,
        meta.block_tables,
        meta.partial,
        meta.partial_lse,
        out.stride(0),
        q.stride(0),
        meta.block_tables.stride(0),
        arena.stride(0) // layout.head_dim,
        layer * layout.layer_elements // layout.head_dim,
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
        STAGES=tiles.stages,
        TMA=tma,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=tiles.warps,
        **dependent(pdl),
    )
    if meta.bounds.max_parts > 1:
        _combine[(heads, meta.bounds.sequences)](
            out,
            meta.counts,
            meta.decode_sequences,
            meta.partial,
            meta.partial_lse,
            out.stride(0),
            SEQUENCES=DECODE_SEQUENCES,
            SEQUENCE_INTS=SEQUENCE_INTS,
            HEADS=heads,
            HEAD_DIM=layout.head_dim,
            BS=8,
            BD=wide,
            KEEP=kept(keep),
            PDL=pdl,
            num_warps=2,
            **dependent(pdl),
        )

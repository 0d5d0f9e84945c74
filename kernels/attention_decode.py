"""Decode attention over the arena: each span of a sequence's keys is one program's, then the spans are combined."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_meta import DECODE_INTS, SEQUENCE_INTS, AttentionMeta
from kernels.fetch import fetch_at
from kernels.launch import cdiv, decode_tiles, dependent, multiprocessors, power_of_two, require, require_rows
from kernels.layout import KvLayout
from kernels.lora_meta import DECODE_ITEMS, DECODE_SEQUENCES


@triton.jit
def _fetch_blocks(
    keys,
    table,
    begin,
    end,
    chunk_elements,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One KV head's keys and values in the first blocks of a span. keys: of the head, in the first chunk."""
    i = tl.arange(0, 2 * AHEAD)
    block = begin // BLOCK_TOKENS + i // 2
    here = block * BLOCK_TOKENS < end
    chunk = tl.load(table + block, mask=here, other=0).to(tl.int64)
    piece = keys + chunk * chunk_elements + i % 2 * (KV_HEADS * BLOCK_TOKENS * HEAD_DIM)
    fetch_at(piece.to(tl.int64, bitcast=True), tl.where(here, BLOCK_TOKENS * HEAD_DIM * SIZE, 0), 2 * AHEAD)


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
    AHEAD: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one KV head's query group against one span of keys. scale includes log2(e)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    g = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    real = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    head = kv_head * GROUP + g
    keys = arena + layer_start + kv_head * (BLOCK_TOKENS * HEAD_DIM)
    values = keys + KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    # The first item is read before anything else is known (the list is never shorter than the grid). Later ones are
    # read in their own turn: triton 3.6 keeps the first value where a bound of the inner loop is carried between turns.
    own = tl.program_id(1)
    first_item = items + own * ITEM_INTS
    first_row = tl.load(first_item)
    first_table = tl.load(first_item + 1)
    first_begin = tl.load(first_item + 2)
    first_end = tl.load(first_item + 3)
    first_whole = tl.load(first_item + 4)
    total = tl.load(counts + ITEMS)
    if PDL:
        if AHEAD > 0:  # keys and values that are there already are on their way while those of this step are stored
            first_line = tables + first_table.to(tl.int64) * table_stride
            past = tl.where(own < total, first_end, 0)
            _fetch_blocks(
                keys, first_line, first_begin, past, chunk_elements, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, SIZE, AHEAD
            )
        tl.extra.cuda.gdc_wait()
    for item in range(own, total, tl.num_programs(1)):
        later = tl.cast(item, tl.int32) > own
        line = items + item * ITEM_INTS
        row = tl.where(later, tl.load(line, mask=later, other=0), first_row).to(tl.int64)
        place = tl.where(later, tl.load(line + 1, mask=later, other=0), first_table).to(tl.int64)
        begin = tl.where(later, tl.load(line + 2, mask=later, other=0), first_begin)
        end = tl.where(later, tl.load(line + 3, mask=later, other=0), first_end)
        whole = tl.where(later, tl.load(line + 4, mask=later, other=0), first_whole)
        table = tables + place * table_stride
        at = (head * HEAD_DIM)[:, None] + d[None, :]
        query = tl.load(q + row * q_stride + at, mask=real, other=0.0)
        acc = tl.zeros([BM, BD], tl.float32)
        most = tl.full([BM], float("-inf"), tl.float32)
        norm = tl.zeros([BM], tl.float32)
        for first in range(begin, end, BN):
            token = first + n
            block = tl.load(table + token // BLOCK_TOKENS, mask=token < end, other=0).to(tl.int64)
            start = block * chunk_elements + (token % BLOCK_TOKENS) * HEAD_DIM
            kv_mask = (token < end)[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(keys + start[:, None] + d[None, :], mask=kv_mask, other=0.0)
            v = tl.load(values + start[:, None] + d[None, :], mask=kv_mask, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            score = tl.where((token < end)[None, :], score, float("-inf"))
            high = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score - high[:, None])
            fade = tl.exp2(most - high)
            norm = norm * fade + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            most = high
        acc = acc / norm[:, None]
        if whole > 0:
            tl.store(out + row * out_stride + at, acc.to(out.dtype.element_ty), mask=real)
        else:
            part = tl.cast(item, tl.int64) * (KV_HEADS * GROUP) + head
            tl.store(partial + part[:, None] * HEAD_DIM + d[None, :], acc, mask=real)
            tl.store(partial_lse + part, most + tl.log2(norm), mask=g < GROUP)


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
        tl.store(out + row * out_stride + head * HEAD_DIM + d, (acc / norm).to(out.dtype.element_ty), mask=d < HEAD_DIM)


def decode_attention(
    out: Tensor,
    q: Tensor,
    arena: Tensor,
    layout: KvLayout,
    layer: int,
    meta: AttentionMeta,
    scale: float,
    pdl: bool = False,
    *,
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
    require(q.dtype == arena.dtype, "q and the arena differ in dtype")
    heads = q.shape[1] // layout.head_dim
    require(heads % layout.kv_heads == 0, f"{heads} heads over {layout.kv_heads} KV heads are not supported")
    group = heads // layout.kv_heads
    grid = meta.bounds.decode_grid
    if each:
        grid = min(grid, cdiv(each * multiprocessors(q.device), layout.kv_heads))
    programs = layout.kv_heads * grid
    tiles = decode_tiles(group, layout.head_dim, q.element_size(), programs / multiprocessors(q.device))
    wide = power_of_two(layout.head_dim)
    _decode[(layout.kv_heads, grid)](
        out,
        q,
        arena,
        meta.counts,
        meta.decode_items,
        meta.block_tables,
        meta.partial,
        meta.partial_lse,
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
        AHEAD=tiles.ahead,
        SIZE=q.element_size(),
        PDL=pdl,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
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
            PDL=pdl,
            num_warps=2,
            **dependent(pdl),
        )

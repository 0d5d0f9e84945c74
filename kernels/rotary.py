"""Rotary embedding with the KV store, the LoRA delta of qkv and, where a model has them, the norms of q and k."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, dependent, kept, power_of_two, require, require_rows
from kernels.layout import KvLayout

HEADS_EACH, WARPS = 8, 4  # heads of one program


@triton.jit
def _rotary_store(
    qkv,
    delta,
    delta_rows,
    q_out,
    arena,
    positions,
    locations,
    table,
    q_weight,
    k_weight,
    eps,
    qkv_stride,
    delta_stride,
    q_stride,
    chunk_elements,
    layer_start,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    DELTA: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BH of one token's query, key and value heads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = part * BH + tl.arange(0, BH)
    i = tl.arange(0, BD)
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & (i < HALF)[None, :]
    at = (head * (2 * HALF))[:, None] + i[None, :]
    position = tl.load(positions + token).to(tl.int64)
    location = tl.load(locations + token)
    if DELTA:  # known before what is waited for
        lora = mask & (head < tl.where(token < tl.load(delta_rows), HEADS + 2 * KV_HEADS, 0))[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
    low = tl.load(qkv + token * qkv_stride + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv + token * qkv_stride + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if DELTA:
        low += tl.load(delta + token * delta_stride + at, mask=lora, other=0.0).to(tl.float32)
        high += tl.load(delta + token * delta_stride + at + HALF, mask=lora, other=0.0).to(tl.float32)
    is_q = (head < HEADS)[:, None]
    turns = (head < HEADS + KV_HEADS)[:, None]
    if NORM:
        square = tl.sum(low * low + high * high, 1) / (2 * HALF)
        scale = tl.where(turns, tl.rsqrt(square + eps)[:, None], 1.0)
        q_low = tl.load(q_weight + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        k_low = tl.load(k_weight + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        q_high = tl.load(q_weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        k_high = tl.load(k_weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        low *= scale * tl.where(turns, tl.where(is_q, q_low, k_low), 1.0)
        high *= scale * tl.where(turns, tl.where(is_q, q_high, k_high), 1.0)
    angle = table + position * (2 * HALF) + i
    cos = tl.where(turns, tl.load(angle, mask=i < HALF, other=0.0)[None, :], 1.0)
    sin = tl.where(turns, tl.load(angle + HALF, mask=i < HALF, other=0.0)[None, :], 0.0)
    out_low = (low * cos - high * sin).to(q_out.dtype.element_ty)
    out_high = (high * cos + low * sin).to(q_out.dtype.element_ty)
    q = q_out + token * q_stride + at
    tl.store(q, out_low, mask=mask & is_q, eviction_policy=KEEP)
    tl.store(q + HALF, out_high, mask=mask & is_q, eviction_policy=KEEP)
    kind = (head >= HEADS + KV_HEADS).to(tl.int32)
    kv_head = head - HEADS - kind * KV_HEADS
    start = (location // BLOCK_TOKENS).to(tl.int64) * chunk_elements + layer_start
    kv_row = ((kind * KV_HEADS + kv_head) * BLOCK_TOKENS + location % BLOCK_TOKENS) * (2 * HALF)
    kv = arena + start + kv_row[:, None] + i[None, :]
    stored = mask & (head >= tl.where(location >= 0, HEADS, HEADS + 2 * KV_HEADS))[:, None]
    tl.store(kv, out_low, mask=stored)
    tl.store(kv + HALF, out_high, mask=stored)


def rotary_store(
    q_out: Tensor,
    qkv: Tensor,
    arena: Tensor,
    layout: KvLayout,
    layer: int,
    positions: Tensor,
    locations: Tensor,
    table: Tensor,
    *,
    delta: Tensor | None = None,
    delta_rows: Tensor | None = None,
    norms: tuple[Tensor, Tensor, float] | None = None,
    pdl: bool = False,
    keep: bool = False,
) -> None:
    """Rotate queries and keys, write queries to q_out and keys and values to the arena's blocks.

    qkv: [tokens, (heads + 2 kv_heads) * head_dim], rows contiguous, q before k before v; q_out: [tokens, heads *
    head_dim] of qkv's dtype (it may be the front of qkv); positions, locations: [tokens] int32, as for store_kv;
    table: [max_positions, head_dim] float32, cosines before sines, with the model's scaling in it; delta: like qkv,
    added to the first delta_rows[0] rows; norms: q's and k's RMSNorm weights [head_dim] and epsilon.

    Semantics: x = qkv[t] (+ delta[t]); q, k are normed where norms are given, then rotated as in
    reference.rotary with table[positions[t]]; q_out[t] = q; k, v are stored as in store_kv.
    """
    require_rows(q_out, qkv, arena)
    require(layout.head_dim % 2 == 0, "an odd head size has no rotary halves")
    heads, half = q_out.shape[1] // layout.head_dim, layout.head_dim // 2
    require(qkv.shape[1] == (heads + 2 * layout.kv_heads) * layout.head_dim, "qkv's columns are not q, k and v")
    require(table.is_contiguous() and table.shape[1] == layout.head_dim, "the table is not [positions, head_dim]")
    require(delta is None or delta_rows is not None, "a delta needs the number of its rows")
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    rows, parts = qkv.shape[0], cdiv(heads + 2 * layout.kv_heads, HEADS_EACH)
    _rotary_store[(rows, parts)](
        qkv,
        qkv if delta is None else delta,
        positions if delta_rows is None else delta_rows,
        q_out,
        arena,
        positions,
        locations,
        table,
        q_weight,
        k_weight,
        eps,
        qkv.stride(0),
        qkv.stride(0) if delta is None else delta.stride(0),
        q_out.stride(0),
        arena.stride(0),
        layer * layout.layer_elements,
        HEADS=heads,
        KV_HEADS=layout.kv_heads,
        HALF=half,
        BLOCK_TOKENS=layout.block_tokens,
        BH=HEADS_EACH,
        BD=power_of_two(half),
        DELTA=delta is not None,
        NORM=norms is not None,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=WARPS,
        **dependent(pdl),
    )

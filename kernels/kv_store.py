"""Store new keys and values into the arena's blocks."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import power_of_two, require, require_rows
from kernels.layout import KvLayout


@triton.jit
def _store_kv(
    k,
    v,
    arena,
    locations,
    k_stride,
    v_stride,
    chunk_elements,
    layer_start,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    location = tl.load(locations + token)
    if location >= 0:
        head = tl.arange(0, BH)
        d = tl.arange(0, BD)
        mask = (head < KV_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
        source = (head * HEAD_DIM)[:, None] + d[None, :]
        start = (location // BLOCK_TOKENS).to(tl.int64) * chunk_elements + layer_start
        target = start + ((head * BLOCK_TOKENS + location % BLOCK_TOKENS) * HEAD_DIM)[:, None] + d[None, :]
        tl.store(arena + target, tl.load(k + token * k_stride + source, mask=mask), mask=mask)
        values = arena + KV_HEADS * BLOCK_TOKENS * HEAD_DIM
        tl.store(values + target, tl.load(v + token * v_stride + source, mask=mask), mask=mask)


def store_kv(k: Tensor, v: Tensor, arena: Tensor, layout: KvLayout, layer: int, locations: Tensor) -> None:
    """k, v: [tokens, kv_heads * head_dim], rows contiguous; locations: [tokens] int32.

    Semantics: with loc = locations[t] >= 0, arena[loc // bt, layer, 0 | 1, h, loc % bt, d] = k | v[t, h, d];
    rows with a negative location, the tails of a graph, store nothing.
    """
    require_rows(k, v, arena)
    width = layout.kv_heads * layout.head_dim
    require(k.shape == v.shape == (locations.shape[0], width), "k and v are not [tokens, kv_heads * head_dim]")
    _store_kv[(k.shape[0],)](
        k,
        v,
        arena,
        locations,
        k.stride(0),
        v.stride(0),
        arena.stride(0),
        layer * layout.layer_elements,
        KV_HEADS=layout.kv_heads,
        HEAD_DIM=layout.head_dim,
        BLOCK_TOKENS=layout.block_tokens,
        BH=power_of_two(layout.kv_heads),
        BD=power_of_two(layout.head_dim),
        num_warps=4,
    )

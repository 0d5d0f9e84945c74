"""Plain torch forms of every kernel: obvious rather than fast, the meaning that the Triton kernels are tested against.

Products and sums run in float32 (float64 for float64 inputs); results are rounded once, to the output's dtype.
"""

import torch
from torch import Tensor

from kernels.layout import PIECE_RANKS, KvLayout, piece_unit


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that references compute in."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- LoRA


def lora_matrix(arena: Tensor, pieces: Tensor, rank: int, features: int, *, by_row: bool) -> Tensor:
    """One adapter's A `[rank, in]` (by_row) or B `[out, rank]` of one module, put together from its pieces.

    pieces: [max_rank_blocks] int32, offsets from the arena's start in units of 256 bytes.
    """
    flat, unit, parts = arena.reshape(-1), piece_unit(arena.element_size()), []
    for block, first in enumerate(range(0, rank, PIECE_RANKS)):
        ranks, start = min(PIECE_RANKS, rank - first), int(pieces[block]) * unit
        shape = (ranks, features) if by_row else (features, ranks)
        parts.append(flat[start : start + ranks * features].view(shape))
    return torch.cat(parts, 0 if by_row else 1)


def lora_shrink(
    x: Tensor,  # [tokens, in]
    arena: Tensor,  # [num_chunks, chunk_elements]
    pieces: Tensor,  # [slots, layers, 7, 2, max_rank_blocks] int32
    ranks: Tensor,  # [slots, layers, 7] int32
    slots: Tensor,  # [tokens] int, -1: the base
    layer: int,
    modules: tuple[int, ...],
) -> Tensor:
    """Semantics: z[t, m, r] = sum_k x[t, k] * A[slots[t], layer, modules[m]][r, k]; 0 beyond the module's rank.

    Returns [tokens, len(modules), max_rank_blocks * 16] float32.
    """
    z = wide(x.new_zeros(x.shape[0], len(modules), pieces.shape[-1] * PIECE_RANKS))
    for slot in _active(slots):
        rows = slots == slot
        for column, module in enumerate(modules):
            rank = int(ranks[slot, layer, module])
            if rank:
                a = lora_matrix(arena, pieces[slot, layer, module, 0], rank, x.shape[1], by_row=True)
                z[rows, column, :rank] = wide(x[rows]) @ wide(a).T
    return z


def lora_expand(
    y: Tensor,  # [tokens, sum(features)]
    z: Tensor,  # [tokens, len(modules), max_rank] float32
    arena: Tensor,
    pieces: Tensor,
    ranks: Tensor,
    slots: Tensor,
    layer: int,
    modules: tuple[int, ...],
    features: tuple[int, ...],
) -> None:
    """Semantics: y[t, first[m] + o] += sum_r z[t, m, r] * B[slots[t], layer, modules[m]][o, r], in place.

    features: out features of each module; first[m] is their running sum. Rows of the base are left as they are.
    """
    for slot in _active(slots):
        rows, first = slots == slot, 0
        for column, (module, size) in enumerate(zip(modules, features, strict=True)):
            rank = int(ranks[slot, layer, module])
            if rank:
                b = lora_matrix(arena, pieces[slot, layer, module, 1], rank, size, by_row=False)
                old = wide(y[rows, first : first + size])
                y[rows, first : first + size] = (old + z[rows, column, :rank] @ wide(b).T).to(y.dtype)
            first += size


def _active(slots: Tensor) -> list[int]:
    return sorted(set(slots.tolist()) - {-1})


# ---------------------------------------------------------------- attention over the arena


def kv_view(arena: Tensor, layout: KvLayout) -> Tensor:
    """The arena as KV blocks, a view: [num_chunks, layers, 2, kv_heads, block_tokens, head_dim]."""
    return arena[:, : layout.elements].view(arena.shape[0], *layout.shape)


def store_kv(
    arena: Tensor,
    layout: KvLayout,
    layer: int,
    k: Tensor,  # [tokens, kv_heads, head_dim]
    v: Tensor,  # [tokens, kv_heads, head_dim]
    locations: Tensor,  # [tokens] int, chunk * block_tokens + offset in the block; -1: not stored
) -> None:
    """Semantics: kv[loc // bt, layer, 0 | 1, :, loc % bt] = k[t] | v[t] for every token with loc >= 0."""
    kept = locations >= 0
    chunk, offset = locations[kept].long() // layout.block_tokens, locations[kept].long() % layout.block_tokens
    view = kv_view(arena, layout)
    view[chunk, layer, 0, :, offset] = k[kept].to(arena.dtype)
    view[chunk, layer, 1, :, offset] = v[kept].to(arena.dtype)


def paged_attention(
    q: Tensor,  # [tokens, heads, head_dim]
    arena: Tensor,
    layout: KvLayout,
    layer: int,
    block_tables: Tensor,  # [rows, max_blocks] int, chunk ids
    rows: Tensor,  # [seqs] int, each sequence's row of block_tables
    starts: Tensor,  # [seqs + 1] int, first token of each sequence in q
    contexts: Tensor,  # [seqs] int, tokens in each sequence's KV, those of this step included
    scale: float,
    window: int = 0,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over its whole cached context.

    Semantics: token i of a sequence with n new ones stands at p = context - n + i and sees keys max(0, p - window + 1)
    .. p (all up to p where window is 0); head h reads KV head h // (heads // kv_heads).
    Returns [tokens, heads, head_dim] in q's dtype; rows outside every sequence are zero.
    """
    out = torch.zeros_like(q)
    for sequence in range(rows.shape[0]):
        first, last = int(starts[sequence]), int(starts[sequence + 1])
        k, v = gather_kv(arena, layout, layer, block_tables[int(rows[sequence])], int(contexts[sequence]))
        out[first:last] = attention(q[first:last], k, v, scale, window)
    return out


def gather_kv(arena: Tensor, layout: KvLayout, layer: int, blocks: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, copied together: two of [context, kv_heads, head_dim]."""
    used = blocks[: -(-context // layout.block_tokens)].long()
    kv = kv_view(arena, layout)[used, layer]  # [blocks, 2, kv_heads, block_tokens, head_dim]
    k, v = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context]
    return k, v


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """One sequence: q [new, heads, d], k and v [context, kv_heads, d] -> [new, heads, d]."""
    new, context, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (wide(t).repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", wide(q), k) * scale
    position = torch.arange(context - new, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)[None, :]
    hidden = key > position
    if window:
        hidden |= key <= position - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


# ---------------------------------------------------------------- elementwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: out[..., i] = x[..., i] / sqrt(mean_j x[..., j]^2 + eps) * weight[i]."""
    wide_x = wide(x)
    return (wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def add_rms_norm(residual: Tensor, y: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """Semantics: residual += y (+ delta), in place; returns rms_norm of that sum, taken before it is rounded."""
    total = wide(residual) + wide(y)
    if delta is not None:
        total = total + wide(delta)
    residual.copy_(total)
    return rms_norm(total, weight, eps).to(residual.dtype)


def rotary(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotate halves: x [tokens, heads, head_dim], positions [tokens] int, table [max_positions, head_dim] float32.

    Semantics: with d = head_dim / 2, c = table[p, i], s = table[p, d + i]:
    out[t, h, i] = x[i] * c - x[d + i] * s; out[t, h, d + i] = x[d + i] * c + x[i] * s. A scaled rope is in the table.
    """
    cos, sin = table[positions.long()][:, None].to(wide(x).dtype).chunk(2, -1)
    low, high = wide(x).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


def silu_mul(gate_up: Tensor, delta: Tensor | None = None) -> Tensor:
    """gate_up [tokens, 2 * size] -> [tokens, size]. Semantics: out[t, i] = silu(g[t, i]) * g[t, size + i]."""
    total = wide(gate_up) if delta is None else wide(gate_up) + wide(delta)
    gate, up = total.chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

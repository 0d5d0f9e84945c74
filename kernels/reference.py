"""Plain torch forms of every kernel, obvious rather than fast: kernels and fast paths are tested against them.

They compute in float32, in float64 where an input is float64, and round once, to the output's dtype.
"""

import torch
from torch import Tensor

from kernels.layout import PIECE_RANKS, PIECE_UNIT, KvLayout


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that references compute in."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- LoRA


def lora_shrink(
    x: Tensor, arena: Tensor, pieces: Tensor, ranks: Tensor, slots: Tensor, layer: int, module: int
) -> Tensor:
    """First half of the adapters' product.

    Semantics: z[t, r] = sum_k x[t, k] * A[slots[t]][r, k], and 0 where slots[t] < 0 or r is beyond the slot's rank.

    x: [tokens, in]; arena: [chunks, chunk_elements]; pieces: [slots, layers, 7, 2, blocks] int32, in units of 256 bytes
    from the arena's start, -1 where absent; ranks: [slots, layers, 7] int32; slots: [tokens] int64.
    Returns [tokens, 16 * blocks] float32.
    """
    wide_x = wide(x)
    z = wide_x.new_zeros(x.shape[0], pieces.shape[-1] * PIECE_RANKS)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for block, size in _blocks(ranks, slot, layer, module):
            a = _piece(arena, pieces[slot, layer, module, 0, block], (size, x.shape[1]))
            z[token, block * PIECE_RANKS : block * PIECE_RANKS + size] = a.to(z.dtype) @ wide_x[token]
    return z


def lora_expand(
    z: Tensor, y: Tensor, arena: Tensor, pieces: Tensor, ranks: Tensor, slots: Tensor, layer: int, module: int
) -> Tensor:
    """Second half: adds the adapters' deltas, rounding once.

    Semantics: out[t, n] = y[t, n] + sum_r B[slots[t]][n, r] * z[t, r], and y[t, n] where slots[t] < 0.

    z: from `lora_shrink`; y: [tokens, out]; the rest as there. Returns [tokens, out] in y's dtype.
    """
    out = wide(y).clone()
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for block, size in _blocks(ranks, slot, layer, module):
            b = _piece(arena, pieces[slot, layer, module, 1, block], (y.shape[1], size))
            out[token] += b.to(out.dtype) @ z[token, block * PIECE_RANKS : block * PIECE_RANKS + size].to(out.dtype)
    return out.to(y.dtype)


def _blocks(ranks: Tensor, slot: int, layer: int, module: int) -> list[tuple[int, int]]:
    """(index, ranks) of the rank blocks of one module."""
    rank = int(ranks[slot, layer, module])
    return [(start // PIECE_RANKS, min(PIECE_RANKS, rank - start)) for start in range(0, rank, PIECE_RANKS)]


def _piece(arena: Tensor, offset: Tensor, shape: tuple[int, int]) -> Tensor:
    start = int(offset) * PIECE_UNIT // arena.element_size()
    return arena.view(-1)[start : start + shape[0] * shape[1]].view(shape)


# ---------------------------------------------------------------- attention over the arena


def attention(
    q: Tensor,
    arena: Tensor,
    block_table: Tensor,
    positions: Tensor,
    layer: int,
    kv_shape: tuple[int, int, int, int],
    window: int = 0,
) -> Tensor:
    """Causal attention over KV blocks in the arena, grouped queries.

    Semantics: out[t, h] = sum_j softmax_j(q[t, h] . K[j, h // group] / sqrt(head_dim)) V[j, h // group] over the
    positions j <= positions[t] of the token's sequence, from positions[t] - window + 1 on where there is a window;
    position j lies in chunk block_table[t, j // block].

    q: [tokens, heads, head_dim]; block_table: [tokens, blocks] int64, the row of each token's sequence;
    positions: [tokens] int64; kv_shape: (layers, kv_heads, block_tokens, head_dim). Returns q's shape and dtype.
    """
    layout = KvLayout(*kv_shape)
    kv, block = kv_view(arena, layout), layout.block_tokens
    group, out = q.shape[1] // layout.kv_heads, torch.empty_like(q)
    for token, position in enumerate(positions.tolist()):
        seen = torch.arange(max(0, position - window + 1) if window else 0, position + 1, device=q.device)
        k, v = kv[block_table[token, seen // block].long(), layer, :, :, seen % block].to(wide(q).dtype).unbind(1)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # [seen, heads, head_dim]
        scores = torch.einsum("hd,shd->hs", wide(q[token]), k) * layout.head_dim**-0.5
        out[token] = torch.einsum("hs,shd->hd", scores.softmax(-1), v).to(q.dtype)
    return out


def kv_view(arena: Tensor, layout: KvLayout) -> Tensor:
    """The arena as KV blocks, a view: [num_chunks, layers, 2, kv_heads, block_tokens, head_dim]."""
    return arena[:, : layout.elements].view(arena.shape[0], *layout.shape)


def store_kv(arena: Tensor, layout: KvLayout, layer: int, k: Tensor, v: Tensor, locations: Tensor) -> None:
    """Semantics: kv[loc // bt, layer, 0 | 1, :, loc % bt] = k[t] | v[t] for every token with loc >= 0, in place.

    k, v: [tokens, kv_heads, head_dim]; locations: [tokens] int, chunk * block_tokens + offset in the block, -1: not
    stored.
    """
    kept = locations >= 0
    chunk, offset = locations[kept].long() // layout.block_tokens, locations[kept].long() % layout.block_tokens
    view = kv_view(arena, layout)
    view[chunk, layer, 0, :, offset] = k[kept].to(arena.dtype)
    view[chunk, layer, 1, :, offset] = v[kept].to(arena.dtype)


# ---------------------------------------------------------------- row by row


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

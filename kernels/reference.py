"""Plain references of the kernels, obvious rather than fast: kernels and fast paths are tested against these."""

import torch
from torch import Tensor

PIECE_UNIT = 256  # bytes; unit of the offsets in the piece table
PIECE_RANKS = 16  # ranks of a full piece


def lora_shrink(
    x: Tensor, arena: Tensor, pieces: Tensor, ranks: Tensor, slots: Tensor, layer: int, module: int
) -> Tensor:
    """First half of the adapters' product, in float32.

    Semantics: z[t, r] = sum_k x[t, k] * A[slots[t]][r, k], and 0 where slots[t] < 0 or r is beyond the slot's rank.

    x: [tokens, in]; arena: [chunks, chunk_elements]; pieces: [slots, layers, 7, 2, blocks] int32, in units of 256 bytes
    from the arena's start, -1 where absent; ranks: [slots, layers, 7] int32; slots: [tokens] int64.
    Returns [tokens, 16 * blocks] float32.
    """
    z = torch.zeros(x.shape[0], pieces.shape[-1] * PIECE_RANKS, device=x.device)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for block, size in _blocks(ranks, slot, layer, module):
            a = _piece(arena, pieces[slot, layer, module, 0, block], (size, x.shape[1]))
            z[token, block * PIECE_RANKS : block * PIECE_RANKS + size] = a.float() @ x[token].float()
    return z


def lora_expand(
    z: Tensor, y: Tensor, arena: Tensor, pieces: Tensor, ranks: Tensor, slots: Tensor, layer: int, module: int
) -> Tensor:
    """Second half: adds the adapters' deltas, in float32, rounding once.

    Semantics: out[t, n] = y[t, n] + sum_r B[slots[t]][n, r] * z[t, r], and y[t, n] where slots[t] < 0.

    z: from `lora_shrink`; y: [tokens, out]; the rest as there. Returns [tokens, out] in y's dtype.
    """
    out = y.float()
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for block, size in _blocks(ranks, slot, layer, module):
            b = _piece(arena, pieces[slot, layer, module, 1, block], (y.shape[1], size))
            out[token] += b.float() @ z[token, block * PIECE_RANKS : block * PIECE_RANKS + size]
    return out.to(y.dtype)


def attention(
    q: Tensor, arena: Tensor, block_table: Tensor, positions: Tensor, layer: int, kv_shape: tuple[int, int, int, int]
) -> Tensor:
    """Causal attention over KV blocks in the arena, grouped queries, in float32.

    Semantics: out[t, h] = sum_j softmax_j(q[t, h] . K[j, h // group] / sqrt(head_dim)) V[j, h // group] over the
    positions j <= positions[t] of the token's sequence; position j lies in chunk block_table[t, j // block].

    q: [tokens, heads, head_dim]; block_table: [tokens, blocks] int64, the row of each token's sequence;
    positions: [tokens] int64; kv_shape: (layers, kv_heads, block_tokens, head_dim). Returns q's shape and dtype.
    """
    layers, kv_heads, block, head_dim = kv_shape
    kv = arena[:, : layers * 2 * kv_heads * block * head_dim].view(-1, layers, 2, kv_heads, block, head_dim)
    group, out = q.shape[1] // kv_heads, torch.empty_like(q)
    for token, position in enumerate(positions.tolist()):
        seen = torch.arange(position + 1, device=q.device)
        k, v = kv[block_table[token, seen // block], layer, :, :, seen % block].float().unbind(1)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # [seen, heads, head_dim]
        scores = torch.einsum("hd,shd->hs", q[token].float(), k) * head_dim**-0.5
        out[token] = torch.einsum("hs,shd->hd", scores.softmax(-1), v).to(q.dtype)
    return out


def _blocks(ranks: Tensor, slot: int, layer: int, module: int) -> list[tuple[int, int]]:
    """(index, ranks) of the rank blocks of one module."""
    rank = int(ranks[slot, layer, module])
    return [(start // PIECE_RANKS, min(PIECE_RANKS, rank - start)) for start in range(0, rank, PIECE_RANKS)]


def _piece(arena: Tensor, offset: Tensor, shape: tuple[int, int]) -> Tensor:
    start = int(offset) * PIECE_UNIT // arena.element_size()
    return arena.view(-1)[start : start + shape[0] * shape[1]].view(shape)

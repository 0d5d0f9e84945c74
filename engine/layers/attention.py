"""Attention over the arena on plain torch: the CPU's path, and the readable one on any device.

A row of the result depends on its own query and on the keys and values up to its position, and on nothing else: not on
the rows beside it, nor on how far the batch is padded, nor on how a prompt was cut into chunks. In bfloat16 on the CPU
that holds to the bit, since the batched products add in the order of the keys and padding adds exact zeros; in float32
the products choose their kernels by shape, and bits may differ.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.dims import ModelDims
from engine.worker.batch import Batch, Span

QUERY_ROWS = 128  # tokens of a prompt that attend in one product; bounds the scores held at once
NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that attend together: single tokens of several sequences, or several tokens of one."""

    tokens: Tensor | slice  # which tokens of the batch: [queries] int64, or a range
    sequences: int
    queries: int  # for each sequence
    capacity: int  # tokens that keys and values are padded to
    pages: Tensor  # [2 * sequences * kv_heads * blocks] int64: pages of layer 0
    mask: Tensor  # [sequences * kv_heads or 1, queries * group or 1, capacity]: 0 or -inf
    window_mask: Tensor  # the same with the sliding window


class TorchAttention:
    """Stores keys and values in the arena's chunks and reads them back by block table. `begin` once a step."""

    def __init__(
        self,
        arena: Tensor,
        dims: ModelDims,
        block_tokens: int,
        window: int | None = None,
        window_layers: tuple[bool, ...] = (),
    ) -> None:
        self._dims = dims
        self._block = block_tokens
        self._arena = arena  # [chunks, chunk_elements]
        self._per_layer = 2 * dims.kv_heads  # pages of a layer in a chunk: a page is one block of one head's K or V
        pages = arena.view(-1, block_tokens * dims.head_dim)
        self._pages = [pages[layer * self._per_layer :] for layer in range(dims.layers)]
        tokens = arena.view(-1, dims.head_dim)
        self._tokens = [tokens[layer * self._per_layer * block_tokens :] for layer in range(dims.layers)]
        self._window = NO_WINDOW if window is None else window
        self._window_layers = window_layers or (False,) * dims.layers
        self._groups: list[Group] = []
        self._stored = torch.empty(0, dtype=torch.int64)

    def begin(self, batch: Batch) -> None:
        """Computes what all layers share: where to store, what to read, what to mask."""
        if batch.fresh_chunks:  # masked keys and values are multiplied by zero, so they must be numbers
            self._arena[list(batch.fresh_chunks)] = 0
        self._stored = self._store_index(batch)
        decodes = [span for span in batch.spans if span.length == 1]
        self._groups = self._decode_groups(batch, decodes)
        for span in batch.spans:
            if span.length > 1:
                self._groups += self._prefill_groups(batch, span)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[tokens, (heads + 2 kv_heads) * head_dim], rotated -> [tokens, heads * head_dim]."""
        dims = self._dims
        heads = qkv.view(qkv.shape[0], dims.heads + 2 * dims.kv_heads, dims.head_dim)
        self._tokens[layer][self._stored] = heads[:, dims.heads :]
        q, out = heads[:, : dims.heads], qkv.new_empty(qkv.shape[0], dims.heads, dims.head_dim)
        for group in self._groups:
            out[group.tokens] = self._attend(layer, group, q[group.tokens])
        return out.view(qkv.shape[0], -1)

    def _attend(self, layer: int, group: Group, q: Tensor) -> Tensor:
        """[sequences * queries, heads, head_dim] -> the same."""
        dims = self._dims
        kv = self._pages[layer].index_select(0, group.pages).view(2, -1, group.capacity, dims.head_dim)
        shape = (group.sequences, group.queries, dims.kv_heads, dims.heads // dims.kv_heads, dims.head_dim)
        queries = q.reshape(shape).transpose(1, 2).reshape(kv.shape[1], -1, dims.head_dim)
        mask = group.window_mask if self._window_layers[layer] else group.mask
        scores = torch.baddbmm(mask, queries, kv[0].transpose(1, 2), alpha=dims.head_dim**-0.5)
        out = torch.bmm(scores.softmax(-1), kv[1])
        return out.view(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2).reshape(q.shape)

    def _store_index(self, batch: Batch) -> Tensor:
        """[tokens, 2 * kv_heads] int64: rows of layer 0 that take each token's keys and values."""
        positions = batch.positions.cpu().numpy()
        chunks = batch.block_table[batch.token_rows, positions // self._block]
        pages = self._first_page(chunks)[:, None] + np.arange(self._per_layer)
        return self._tensor(pages * self._block + (positions % self._block)[:, None])

    def _decode_groups(self, batch: Batch, spans: list[Span]) -> list[Group]:
        """Sequences of like length share a product, padded to the same number of blocks."""
        by_blocks: dict[int, list[Span]] = {}
        for span in spans:
            by_blocks.setdefault(self._bucket(span.context), []).append(span)
        return [self._decode_group(batch, members, blocks) for blocks, members in by_blocks.items()]

    def _decode_group(self, batch: Batch, spans: list[Span], blocks: int) -> Group:
        positions = np.array([[span.start] for span in spans])
        capacity = blocks * self._block
        masks = [
            self._mask(positions, capacity, window).repeat_interleave(self._dims.kv_heads, 0)[:, None]
            for window in (NO_WINDOW, self._window)
        ]
        pages = self._read_index(batch, spans, blocks)
        tokens = self._tensor(np.array([span.first for span in spans]))
        return Group(tokens, len(spans), 1, capacity, pages, masks[0], masks[1])

    def _prefill_groups(self, batch: Batch, span: Span) -> list[Group]:
        """Slabs of one sequence's tokens, each with the keys up to its own last token."""
        groups = []
        for first in range(0, span.length, QUERY_ROWS):
            length = min(QUERY_ROWS, span.length - first)
            start = span.start + first
            blocks = -(-(start + length) // self._block)
            positions, capacity = np.arange(start, start + length)[:, None], blocks * self._block
            masks = [
                self._mask(positions, capacity, window).repeat_interleave(self._dims.heads // self._dims.kv_heads, 0)[
                    None
                ]
                for window in (NO_WINDOW, self._window)
            ]
            tokens = slice(span.first + first, span.first + first + length)
            groups.append(Group(tokens, 1, length, capacity, self._read_index(batch, [span], blocks), *masks))
        return groups

    def _read_index(self, batch: Batch, spans: list[Span], blocks: int) -> Tensor:
        """Pages of layer 0 in the order K, V; sequence; head; block. Behind its last block a sequence repeats it."""
        last = np.array([[-(-span.context // self._block) - 1] for span in spans])
        chunks = batch.block_table[np.array([[span.row] for span in spans]), np.minimum(np.arange(blocks), last)]
        heads = np.arange(self._per_layer).reshape(2, 1, -1, 1)
        return self._tensor((self._first_page(chunks)[None, :, None] + heads).reshape(-1))

    def _mask(self, positions: NDArray[np.int64], capacity: int, window: int) -> Tensor:
        """[queries, capacity]: 0 where a key is seen from the position, -inf elsewhere."""
        keys = np.arange(capacity)
        hidden = (keys > positions) | (keys <= positions - window)
        mask = torch.zeros(hidden.shape, dtype=self._arena.dtype, device=self._arena.device)
        return mask.masked_fill_(self._tensor(hidden), float("-inf"))

    def _first_page(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        return chunks * (self._dims.layers * self._per_layer)

    def _bucket(self, context: int) -> int:
        """Blocks that a context is padded to: four steps an octave, so that few groups cover all lengths."""
        blocks = -(-context // self._block)
        step = max(4, 1 << max(0, blocks.bit_length() - 3))
        return -(-blocks // step) * step

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._arena.device)

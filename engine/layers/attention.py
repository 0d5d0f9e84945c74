"""Attention over the arena on plain torch: the CPU's path, and the readable one on any device.

A row of the result depends on its own query and on the keys and values up to its position, and on nothing else: not on
the rows beside it, nor on how far the batch is padded, nor on how a prompt was cut into chunks. In bfloat16 on the CPU
that holds to the bit, since the batched products add in the order of the keys and padding adds exact zeros; in float32
the products choose their kernels by shape, and bits may differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.layers.mirror import KvMirror, Lane
from engine.layers.rotary import Rotary, rotate
from engine.models.dims import ModelDims
from engine.worker.batch import Batch, Span

QUERY_ROWS = 128  # tokens of a prompt that attend in one product; bounds the scores held at once
NO_WINDOW = 1 << 40
EARLY_STEPS = 16  # before a lane's end, in which its members move to a longer one


class KvSource(Protocol):
    """Where a group's keys and values come from, padded to one capacity."""

    def read(self, layer: int, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """`kv`: what a lane takes of the step's, see `Layout`. Returns K and V, each [batch, capacity, head_dim]."""
        ...


class Gathered:
    """Pages copied out of the arena, layer by layer."""

    def __init__(self, pages: Sequence[Tensor], index: Tensor, capacity: int, head_dim: int) -> None:
        self._pages = pages
        self._index = index  # [2 * batch * blocks] int64: pages of layer 0
        self._shape = (2, -1, capacity, head_dim)

    def read(self, layer: int, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        k, v = self._pages[layer].index_select(0, self._index).view(self._shape).unbind(0)
        return k, v


class Mirrored:
    """A lane of the mirror, which the step's own tokens join before it is read."""

    def __init__(self, lane: Lane, rows: Tensor) -> None:
        self._tokens, self._keys, self._values = lane.by_layer()
        self._rows = rows  # [members * 2 * kv_heads] int64: where in the lane they go

    def read(self, layer: int, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        if kv is not None:
            self._tokens[layer].index_copy_(0, self._rows, kv)
        return self._keys[layer], self._values[layer]


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that attend together: single tokens of several sequences, or several tokens of one."""

    tokens: NDArray[np.int64]  # [sequences, queries]: which tokens of the batch
    mask: Tensor  # [sequences * kv_heads or 1, queries * group or 1, capacity]: 0 or -inf
    window_mask: Tensor  # the same with the sliding window
    source: KvSource


@dataclass(frozen=True, slots=True)
class Layout:
    """How a step's heads are laid out for the products: all queries, group by group, then keys and values by token.

    In a group queries are ordered by sequence, KV head, token; tokens whose keys and values a lane takes come first.
    """

    split: Tensor  # [tokens * (heads + 2 kv_heads)] int64: heads of the batch in the layout's order
    swapped: Tensor  # [the same * 2] int64: their halves, the second before the first
    cos: Tensor  # [the same, head_dim]: how each is turned; values are not
    sin: Tensor  # likewise
    merge: Tensor  # [tokens * heads] int64: the layout's queries in the batch's order
    queries: list[int]  # heads that ask, of each group
    taken: list[int]  # keys and values of one layer that a lane takes, of each of the first groups
    rest: int  # keys and values of one layer that no lane takes
    stored: Tensor  # int64: rows of layer 0's arena that take the keys and values behind the mirrored ones
    mirrored: Tensor  # [layers * mirrored tokens * 2 kv_heads] int64: rows of the arena for those, over all layers


class TorchAttention:
    """Keeps keys and values in the arena's chunks and reads them back by block table or from the mirror's lanes.

    `begin` and `finish` once a step. What a lane has taken reaches the arena in `finish`, for all layers at once.
    """

    def __init__(
        self,
        arena: Tensor,
        dims: ModelDims,
        block_tokens: int,
        rotary: Rotary,
        window: int | None = None,
        window_layers: tuple[bool, ...] = (),
        mirror_bytes: int = 0,
        early: int = EARLY_STEPS,
    ) -> None:
        """`early`: in how many steps before they must sequences move to a longer lane; with 0 none moves early."""
        self._dims = dims
        self._block = block_tokens
        self._rotary = rotary
        self._arena = arena  # [chunks, chunk_elements]
        self._per_layer = 2 * dims.kv_heads  # pages of a layer in a chunk: a page is one block of one head's K or V
        pages = arena.view(-1, block_tokens * dims.head_dim)
        self._pages = [pages[layer * self._per_layer :] for layer in range(dims.layers)]
        tokens = arena.view(-1, dims.head_dim)
        self._tokens = [tokens[layer * self._per_layer * block_tokens :] for layer in range(dims.layers)]
        self._window = NO_WINDOW if window is None else window
        self._window_layers = window_layers or (False,) * dims.layers
        self._early = early if mirror_bytes else 0
        self._mirror = KvMirror(arena, dims, block_tokens, mirror_bytes)
        self._groups: list[Group] = []
        self._layout: Layout | None = None
        self._taken: list[Tensor] = []  # by layer, what lanes have taken

    def begin(self, batch: Batch) -> None:
        """Computes what all layers share: where to store, what to read, what to mask."""
        if batch.fresh_chunks:  # masked keys and values are multiplied by zero, so they must be numbers
            self._arena[list(batch.fresh_chunks)] = 0
        self._groups = self._decode_groups(batch)
        for span in batch.spans:
            if span.length > 1:
                self._groups += self._prefill_groups(batch, span)
        self._layout = self._lay_out(batch)
        self._taken = []

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[tokens, (heads + 2 kv_heads) * head_dim] -> [tokens, heads * head_dim]."""
        layout = self._layout
        if layout is None:
            raise RuntimeError("attention without begin")
        heads = qkv.view(-1, self._dims.head_dim).index_select(0, layout.split)
        swapped = qkv.view(-1, self._dims.head_dim // 2).index_select(0, layout.swapped)
        rotate(heads, swapped.view_as(heads), layout.cos, layout.sin)  # in whole rows, which the gather has made
        # one split in place of many slices, each of which costs as much as a small operation
        parts = heads.split_with_sizes([*layout.queries, *layout.taken, layout.rest])
        queries, taken = parts[: len(layout.queries)], parts[len(layout.queries) : -1]
        if layout.rest:
            self._tokens[layer].index_copy_(0, layout.stored, parts[-1])
        self._taken += taken
        out = heads.new_empty(len(layout.merge), self._dims.head_dim)
        for group, asked, kv, result in zip_longest(self._groups, queries, taken, out.split_with_sizes(layout.queries)):
            self._attend(layer, group, asked, kv, result)
        return out.index_select(0, layout.merge).view(qkv.shape[0], -1)

    def finish(self) -> None:
        """Brings to the arena what the step's lanes have taken."""
        if self._layout is not None and self._taken:
            self._tokens[0].index_copy_(0, self._layout.mirrored, torch.cat(self._taken))
            self._taken = []

    def _attend(self, layer: int, group: Group, queries: Tensor, kv: Tensor | None, out: Tensor) -> None:
        """[sequences * kv_heads * queries * heads of a KV head, head_dim] -> `out`, the same."""
        k, v = group.source.read(layer, kv)
        mask = group.window_mask if self._window_layers[layer] else group.mask
        shape = (k.shape[0], -1, k.shape[2])
        scores = torch.baddbmm(mask, queries.view(shape), k.transpose(1, 2), alpha=self._dims.head_dim**-0.5)
        torch.bmm(scores.softmax(-1), v, out=out.view(shape))

    def _lay_out(self, batch: Batch) -> Layout:
        """The groups' order; theirs start with the lanes'."""
        dims, heads = self._dims, self._dims.heads + self._per_layer
        queries = np.concatenate([self._query_rows(group.tokens) for group in self._groups])
        tokens = np.concatenate([group.tokens.reshape(-1) for group in self._groups])
        kv = (tokens[:, None] * heads + np.arange(dims.heads, heads)).reshape(-1)
        merge = np.empty(len(queries), np.int64)
        merge[queries // heads * dims.heads + queries % heads] = np.arange(len(queries))
        taken = [group.tokens.size for group in self._groups if isinstance(group.source, Mirrored)]
        mirrored = sum(taken)
        stored = self._store_index(batch)[tokens]
        layers = np.arange(dims.layers)[:, None] * (self._per_layer * self._block)
        split = np.concatenate([queries, kv])
        positions = batch.positions.cpu().numpy()[split // heads]
        positions[split % heads >= dims.heads + dims.kv_heads] = self._rotary.nowhere
        cos, sin = self._rotary.rows(self._tensor(positions))
        return Layout(
            split=self._tensor(split),
            swapped=self._tensor((2 * split[:, None] + [1, 0]).reshape(-1)),
            cos=cos,
            sin=sin,
            merge=self._tensor(merge),
            queries=[group.tokens.size * dims.heads for group in self._groups],
            taken=[size * self._per_layer for size in taken],
            rest=(len(tokens) - mirrored) * self._per_layer,
            stored=self._tensor(stored[mirrored:].reshape(-1)),
            mirrored=self._tensor((layers + stored[:mirrored].reshape(-1)).reshape(-1)),
        )

    def _query_rows(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """[sequences * kv_heads * queries * heads of a KV head]: which heads of the batch a group asks with."""
        dims = self._dims
        heads = np.arange(dims.heads).reshape(1, dims.kv_heads, 1, -1)
        return (tokens[:, None, :, None] * (dims.heads + self._per_layer) + heads).reshape(-1)

    def _store_index(self, batch: Batch) -> NDArray[np.int64]:
        """[tokens, 2 * kv_heads]: rows of layer 0 that take each token's keys and values."""
        positions = batch.positions.cpu().numpy()
        chunks = batch.block_table[batch.token_rows, positions // self._block]
        pages = self._first_page(chunks)[:, None] + np.arange(self._per_layer)
        rows: NDArray[np.int64] = pages * self._block + (positions % self._block)[:, None]
        return rows

    def _decode_groups(self, batch: Batch) -> list[Group]:
        """Sequences of like length share a product, padded to the same number of blocks."""
        by_blocks: dict[int, list[Span]] = {}
        single = [span for span in batch.spans if span.length == 1]
        for span, blocks in self._capacities(single):
            by_blocks.setdefault(blocks, []).append(span)
        lanes, rest = self._mirror.update(by_blocks, batch.block_table)
        groups = list[Group]()
        for lane, spans in ((group.lane, group.spans) for group in lanes):
            rows = self._tensor(lane.rows(np.array([span.start for span in spans])).reshape(-1))
            groups.append(self._decode_group(spans, lane.capacity, Mirrored(lane, rows)))
        for blocks, members in rest.items():
            source = self._gathered(batch, members, blocks)
            groups.append(self._decode_group(members, blocks * self._block, source))
        return groups

    def _capacities(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int]]:
        """Each span with the blocks of the lane that takes it.

        A lane's members that began together outgrow it in one step, and each move copies megabytes. So they move in the
        last `early` steps before they must, as few a step as bring all over in time.
        """
        early, left = list[Span](), 0  # who may move, and in how many steps the first must
        for span in spans:
            blocks, ahead = self._blocks(span.context), self._blocks(span.context + self._early)
            moves = self._mirror.holds(blocks, span.sequence_id) and not self._mirror.holds(ahead, span.sequence_id)
            if ahead == blocks or not moves:
                yield span, ahead
            else:
                steps = blocks * self._block - span.context + 1
                left = min(left, steps) if early else steps
                early.append(span)
        moving = -(-len(early) // left) if early else 0
        early.sort(key=lambda span: -span.context)
        for index, span in enumerate(early):
            yield span, self._blocks(span.context + (self._early if index < moving else 0))

    def _blocks(self, context: int) -> int:
        return bucket(-(-context // self._block))

    def _decode_group(self, spans: Sequence[Span], capacity: int, source: KvSource) -> Group:
        positions = np.array([[span.start] for span in spans])
        masks = [mask.repeat_interleave(self._dims.kv_heads, 0)[:, None] for mask in self._masks(positions, capacity)]
        return Group(np.array([[span.first] for span in spans]), masks[0], masks[1], source)

    def _prefill_groups(self, batch: Batch, span: Span) -> list[Group]:
        """Slabs of one sequence's tokens, each with the keys up to its own last token."""
        groups = []
        for first in range(0, span.length, QUERY_ROWS):
            length = min(QUERY_ROWS, span.length - first)
            start = span.start + first
            blocks = -(-(start + length) // self._block)
            positions, share = np.arange(start, start + length)[:, None], self._dims.heads // self._dims.kv_heads
            masks = [mask.repeat_interleave(share, 0)[None] for mask in self._masks(positions, blocks * self._block)]
            tokens = np.arange(span.first + first, span.first + first + length)[None]
            groups.append(Group(tokens, masks[0], masks[1], self._gathered(batch, [span], blocks)))
        return groups

    def _gathered(self, batch: Batch, spans: Sequence[Span], blocks: int) -> Gathered:
        """In the order K, V; sequence; head; block. Behind its last block a sequence repeats it."""
        last = np.array([[-(-span.context // self._block) - 1] for span in spans])
        chunks = batch.block_table[np.array([[span.row] for span in spans]), np.minimum(np.arange(blocks), last)]
        heads = np.arange(self._per_layer).reshape(2, 1, -1, 1)
        index = self._tensor((self._first_page(chunks)[None, :, None] + heads).reshape(-1))
        return Gathered(self._pages, index, blocks * self._block, self._dims.head_dim)

    def _masks(self, positions: NDArray[np.int64], capacity: int) -> tuple[Tensor, Tensor]:
        """Of layers that see everything and of those that see a window."""
        full = self._mask(positions, capacity, NO_WINDOW)
        return full, full if self._window == NO_WINDOW else self._mask(positions, capacity, self._window)

    def _mask(self, positions: NDArray[np.int64], capacity: int, window: int) -> Tensor:
        """[queries, capacity]: 0 where a key is seen from the position, -inf elsewhere."""
        keys = np.arange(capacity)
        hidden = (keys > positions) | (keys <= positions - window)
        mask = torch.zeros(hidden.shape, dtype=self._arena.dtype, device=self._arena.device)
        return mask.masked_fill_(self._tensor(hidden), float("-inf"))

    def _first_page(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        return chunks * (self._dims.layers * self._per_layer)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._arena.device)


def bucket(blocks: int) -> int:
    """Blocks that a context is padded to: multiples of 8, then four steps an octave, so that few groups cover all."""
    step = max(8, 1 << max(0, (blocks - 1).bit_length() - 3))
    return -(-blocks // step) * step

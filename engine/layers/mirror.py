"""A dense copy of the KV of sequences that decode, kept up to date token by token, for attention without gathering.

Sequences of like length share a lane: tensors exactly as long as the lane's capacity, which is what batched products
read fastest. The arena stays the truth: a lane is filled from it when a sequence begins to decode or outgrows its lane,
and whoever is not in a step leaves. What is masked in a lane is multiplied by zero, so all of it must be numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.models.dims import ModelDims
from engine.worker.batch import Span


class Lane:
    """The members of one capacity, densely packed; places 0 .. len(members) - 1 are in use."""

    def __init__(self, arena_kv: Tensor, capacity_blocks: int) -> None:
        self._arena = arena_kv  # [chunks, layers, 2, kv_heads, block_tokens, head_dim]
        _, self._layers, _, self._heads, self._block, self._dim = arena_kv.shape
        self.blocks = capacity_blocks
        self.capacity = capacity_blocks * self._block  # tokens
        self.members: list[int] = []  # sequence ids
        self._lengths: dict[int, int] = {}  # sequence id -> tokens that are up to date
        self._kv = self._allocate(0)  # [layers, 2, places, kv_heads, capacity, head_dim]

    @property
    def places(self) -> int:
        return self._kv.shape[2]

    def nbytes(self, places: int) -> int:
        return self._layers * 2 * places * self._heads * self.capacity * self._dim * self._kv.element_size()

    def update(self, spans: Mapping[int, Span], block_table: NDArray[np.int64]) -> None:
        """Makes the members exactly these (by sequence id), each with its keys and values up to the span's start."""
        kept = [i for i in self.members if i in spans and self._lengths[i] == spans[i].start]
        new = [i for i in spans if i not in set(kept)]
        self._repack(kept, new, len(spans))
        for sequence_id in new:
            self._fill(self.members.index(sequence_id), spans[sequence_id], block_table)
        self._lengths = {i: span.context for i, span in spans.items()}

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[members, 2 * kv_heads]: which row of `tokens` takes each member's key and value at its position."""
        side_and_head = np.arange(2 * self._heads)
        first = (side_and_head // self._heads * self.places + np.arange(len(positions))[:, None]) * self._heads
        return (first + side_and_head % self._heads) * self.capacity + positions[:, None]

    def tokens(self, layer: int) -> Tensor:
        """[2 * places * kv_heads * capacity, head_dim] of one layer."""
        return self._kv[layer].view(-1, self._dim)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Each [members * kv_heads, capacity, head_dim]."""
        k, v = self._kv[layer, :, : len(self.members)].flatten(1, 2).unbind(0)
        return k, v

    def _repack(self, kept: Sequence[int], new: Sequence[int], count: int) -> None:
        """New members take the places of those that left; what is left behind the end moves into holes."""
        stay = set(kept)
        members: list[int | None] = [i if i in stay else None for i in self.members]
        members += [None] * (count - len(members))
        if count > self.places:
            self._grow(count)
        arriving, leaving = list(new), [p for p in range(count, len(members)) if members[p] is not None]
        for place in range(count):
            if members[place] is None and leaving:
                source = leaving.pop()
                self._kv[:, :, place].copy_(self._kv[:, :, source])
                members[place] = members[source]
            elif members[place] is None:
                members[place] = arriving.pop()
        self.members = [i for i in members[:count] if i is not None]

    def _fill(self, place: int, span: Span, block_table: NDArray[np.int64]) -> None:
        """Copies the blocks before the span from the arena and clears the rest."""
        blocks = -(-span.start // self._block)
        target = self._kv[:, :, place].unflatten(3, (-1, self._block))  # type: ignore[no-untyped-call]
        if blocks:
            source = self._arena[block_table[span.row, :blocks].tolist()].permute(1, 2, 3, 0, 4, 5)
            target[:, :, :, :blocks].copy_(source)
        target[:, :, :, blocks:].zero_()

    def _grow(self, count: int) -> None:
        grown = self._allocate(count + count // 4)
        grown[:, :, : self.places].copy_(self._kv)
        self._kv = grown

    def _allocate(self, places: int) -> Tensor:
        return self._arena.new_zeros(self._layers, 2, places, self._heads, self.capacity, self._dim)


@dataclass(frozen=True, slots=True)
class LaneGroup:
    """A lane in one step, with the spans in the order of its members."""

    lane: Lane
    spans: tuple[Span, ...]


class KvMirror:
    """Lanes by capacity, within a limit of bytes. Sequences beyond it are read from the arena instead."""

    def __init__(self, arena: Tensor, dims: ModelDims, block_tokens: int, limit_bytes: int) -> None:
        shape = (dims.layers, 2, dims.kv_heads, block_tokens, dims.head_dim)
        self._arena_kv = arena[:, : dims.kv_elements_per_token * block_tokens].unflatten(1, shape)  # type: ignore[no-untyped-call]
        self._limit = limit_bytes
        self._lanes: dict[int, Lane] = {}  # by capacity in blocks

    def update(
        self, by_blocks: Mapping[int, Sequence[Span]], block_table: NDArray[np.int64]
    ) -> tuple[list[LaneGroup], dict[int, Sequence[Span]]]:
        """Takes the step's single tokens by capacity; returns (lanes ready to be read, spans there is no room for)."""
        self._lanes = {blocks: lane for blocks, lane in self._lanes.items() if blocks in by_blocks}
        groups, rest, used = list[LaneGroup](), dict[int, Sequence[Span]](), 0
        for blocks, spans in sorted(by_blocks.items()):
            lane = self._lanes.get(blocks) or Lane(self._arena_kv, blocks)
            size = lane.nbytes(max(lane.places, len(spans)))
            if used + size > self._limit:
                self._lanes.pop(blocks, None)
                rest[blocks] = spans
                continue
            used += size
            self._lanes[blocks] = lane
            by_id = {span.sequence_id: span for span in spans}
            lane.update(by_id, block_table)
            groups.append(LaneGroup(lane, tuple(by_id[i] for i in lane.members)))
        return groups, rest

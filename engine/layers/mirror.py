"""A dense copy of the KV of sequences that decode, kept up to date token by token, for attention without gathering.

Sequences of like length share a lane: tensors exactly as long as the lane's capacity, which is what batched products
read fastest. The arena stays the truth: a lane is filled from it when a sequence begins to decode or outgrows its lane,
and whoever is not in a step leaves. What is masked in a lane is multiplied by zero, so all of it must be numbers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.layers.touched import TouchedMemory
from engine.models.dims import ModelDims
from engine.worker.batch import Span
from kernels.launch import power_of_two

PLENTY = 0.9  # of the limit: as long as lanes take no more, a new one has places for all that may come
SMALL = 64 << 20  # bytes of a lane that may grow: its members are copied, which a step waits for


class Lane:
    """Members of one capacity, densely packed in its first places.

    Its memory is lent by `memory` where that has as much in one piece: fresh memory would hold a step up.
    """

    def __init__(self, arena_kv: Tensor, capacity_blocks: int, memory: TouchedMemory) -> None:
        _, self._layers, _, self._heads, self._block, self._dim = arena_kv.shape
        self._arena = as_bytes(arena_kv.flatten(4))  # [chunks, layers, 2, kv_heads, bytes of a page]
        self._memory = memory
        self.blocks = capacity_blocks
        self.capacity = capacity_blocks * self._block  # tokens
        self.members: list[int] = []  # sequence ids
        self._lengths: dict[int, int] = {}  # sequence id -> tokens that are up to date
        self._kv = arena_kv.new_empty(self._layers, 2, 0, self._heads, self.capacity, self._dim)

    @property
    def places(self) -> int:
        return self._kv.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory taken so far."""
        return self._kv.nbytes

    def holds(self, sequence_id: int) -> bool:
        return sequence_id in self._lengths

    def nbytes_for(self, places: int) -> int:
        """Memory that so many places take."""
        return self._layers * 2 * places * self._heads * self.capacity * self._dim * self._kv.element_size()

    def reserve(self, places: int, *, lent: bool) -> bool:
        """Whether there are so many now, in memory that is `lent` or any; who is there keeps its place."""
        if places > self.places:
            before, shape = self._kv, (self._layers, 2, places, self._heads, self.capacity, self._dim)
            after = self._lent(shape) if lent else self._fresh(shape)
            if after is None:
                return False
            self._kv = after
            self._pages()[:, :, : before.shape[2]] = self._pages(before)
            self._memory.give(before)
        return True

    def release(self) -> None:
        """Gives its memory back; it is not used any more."""
        self._memory.give(self._kv)

    def update(
        self, spans: Mapping[int, Span], block_table: NDArray[np.int64], others: Collection["Lane"] = ()
    ) -> None:
        """Makes the members exactly these (by sequence id), each with its keys and values up to the span's start.

        Who comes from one of `others` is copied from there, several times as fast as block by block from the arena.
        """
        kept = {i for i in self.members if i in spans and self._lengths[i] == spans[i].start}
        new = [i for i in spans if i not in kept]
        self._repack(kept, new, len(spans))
        for place, sequence_id in enumerate(self.members):
            if sequence_id not in kept:
                span = spans[sequence_id]
                other = next((lane for lane in others if lane._lengths.get(sequence_id) == span.start), None)
                if other is None:
                    self._fill(place, span, block_table)
                else:
                    self._copy(place, span, other)
        self._lengths = {i: span.context for i, span in spans.items()}

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[members, 2 * kv_heads]: which row of a layer takes each member's key and value at its position."""
        side_and_head = np.arange(2 * self._heads)
        place = side_and_head // self._heads * self.places + np.arange(len(positions))[:, None]
        return (place * self._heads + side_and_head % self._heads) * self.capacity + positions[:, None]

    def by_layer(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Of each layer: all that `rows` counts, [2 * places * kv_heads * capacity, head_dim], and the members' keys
        and values, each [members * kv_heads, capacity, head_dim]."""
        members = self._kv[:, :, : len(self.members)].flatten(2, 3)
        return self._kv.flatten(1, 4).unbind(0), members[:, 0].unbind(0), members[:, 1].unbind(0)

    def _lent(self, shape: Sequence[int]) -> Tensor | None:
        memory = self._memory.take(prod(shape) * self._kv.element_size())
        return None if memory is None else memory.view(self._kv.dtype).view(shape)

    def _fresh(self, shape: Sequence[int]) -> Tensor | None:
        try:
            return self._kv.new_empty(shape)
        except RuntimeError:  # there is none
            return None

    def _pages(self, kv: Tensor | None = None) -> NDArray[np.uint8]:
        """[layers, 2, places, kv_heads, blocks, bytes of a page]: for small slices NumPy is 100 times as fast."""
        kv = self._kv if kv is None else kv
        return as_bytes(kv.view(*kv.shape[:4], self.blocks, self._block * self._dim))

    def _repack(self, kept: set[int], new: Sequence[int], count: int) -> None:
        """Those that stay keep their places as far as they lie within the count; the rest fill the gaps."""
        before = [i if i in kept else None for i in self.members]
        members, arriving = before[:count] + [None] * (count - len(before)), list(new)
        outside = [place for place in range(count, len(before)) if before[place] is not None]
        for place, member in enumerate(members):
            if member is None and outside:
                source = outside.pop()
                self._kv[:, :, place] = self._kv[:, :, source]
                members[place] = before[source]
            elif member is None:
                members[place] = arriving.pop()
        self.members = [i for i in members if i is not None]

    def _fill(self, place: int, span: Span, block_table: NDArray[np.int64]) -> None:
        """Copies the blocks before the span from the arena and clears the rest."""
        target, blocks = self._pages()[:, :, place], -(-span.start // self._block)
        for block, chunk in enumerate(block_table[span.row, :blocks].tolist()):
            target[:, :, :, block] = self._arena[chunk]
        target[:, :, :, blocks:] = 0

    def _copy(self, place: int, span: Span, other: "Lane") -> None:
        """Copies the blocks before the span from another lane and clears the rest."""
        target, tokens = self._kv[:, :, place], -(-span.start // self._block) * self._block
        target[:, :, :, :tokens] = other._kv[:, :, other.members.index(span.sequence_id), :, :tokens]
        target[:, :, :, tokens:] = 0


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The same memory, of the CPU; the last dimension in bytes."""
    array: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return array


@dataclass(frozen=True, slots=True)
class LaneGroup:
    """A lane in one step, with the spans in the order of its members."""

    lane: Lane
    spans: tuple[Span, ...]


class KvMirror:
    """Lanes by capacity, within a limit of bytes. Sequences beyond it are read from the arena instead.

    A capacity has one lane with places for all that are in the step, where memory is plenty: they may follow. Where it
    is not, it has several, none of which grows once it is large: members that move to longer lanes leave them one by
    one, and a lane that nobody is in makes room for the next.
    """

    def __init__(self, arena: Tensor, dims: ModelDims, block_tokens: int, limit_bytes: int) -> None:
        shape = (-1, dims.layers, 2, dims.kv_heads, block_tokens, dims.head_dim)
        self._arena_kv = arena.view(shape)
        self._limit = limit_bytes
        self._memory = TouchedMemory(limit_bytes)
        self._lanes: list[Lane] = []  # least recently used first
        self._idle: list[Lane] = []  # of them, those that nobody in the step is in; the next to make room first

    def holds(self, blocks: int, sequence_id: int) -> bool:
        """Whether a lane of this capacity has the sequence as a member."""
        return any(lane.blocks == blocks and lane.holds(sequence_id) for lane in self._lanes)

    def update(
        self, by_blocks: Mapping[int, Sequence[Span]], block_table: NDArray[np.int64]
    ) -> tuple[list[LaneGroup], dict[int, Sequence[Span]]]:
        """Takes the step's single tokens by capacity; returns (lanes ready to be read, spans there is no room for)."""
        groups, rest = list[LaneGroup](), dict[int, Sequence[Span]]()
        everybody = [span.sequence_id for spans in by_blocks.values() for span in spans]
        stay = [lane for lane in self._lanes if any(lane.holds(s.sequence_id) for s in by_blocks.get(lane.blocks, ()))]
        self._idle = [lane for lane in self._lanes if lane not in stay]
        self._idle.sort(key=lambda lane: any(map(lane.holds, everybody)))  # they are copied from: last
        for blocks in sorted(by_blocks, reverse=True):  # who moves to a longer lane still is in the shorter
            placed, left = self._place(blocks, by_blocks[blocks], len(everybody))
            for lane, spans in placed:
                by_id = {span.sequence_id: span for span in spans}
                lane.update(by_id, block_table, [other for other in self._lanes if other is not lane])
                groups.append(LaneGroup(lane, tuple(by_id[i] for i in lane.members)))
            if left:
                rest[blocks] = left
        used = [group.lane for group in groups]
        self._lanes = [lane for lane in self._lanes if lane not in used] + used
        return groups, rest

    def _place(
        self, blocks: int, spans: Sequence[Span], everybody: int
    ) -> tuple[list[tuple[Lane, list[Span]]], list[Span]]:
        """(lanes of the capacity with those whom each takes, spans there is no room for)."""
        placed, waiting = list[tuple[Lane, list[Span]]](), list(spans)
        for lane in (lane for lane in self._lanes if lane.blocks == blocks and lane not in self._idle):
            members = [span for span in waiting if lane.holds(span.sequence_id)]
            waiting = [span for span in waiting if not lane.holds(span.sequence_id)]
            placed.append((lane, members))
        for lane, members in placed:
            wanted = min(len(members) + len(waiting), everybody)
            if wanted > lane.places and lane.nbytes <= SMALL:
                self._grow(lane, wanted, everybody)
            free = lane.places - len(members)
            members += waiting[:free]
            waiting = waiting[free:]
        while waiting and (made := self._another(blocks, len(waiting), everybody - len(spans) + len(waiting))):
            placed.append((made, waiting[: made.places]))
            waiting = waiting[made.places :]
        return placed, waiting

    def _grow(self, lane: Lane, members: int, everybody: int) -> None:
        """To places for all in the step, rounded up so that it grows a few times; or for those who are there."""
        if not self._reserve(lane, power_of_two(everybody), PLENTY):
            self._reserve(lane, members, 1.0)

    def _another(self, blocks: int, members: int, everybody: int) -> Lane | None:
        """One more lane, with places for as many of those who may come as there is memory for; None: there is none."""
        lane, places = Lane(self._arena_kv, blocks, self._memory), power_of_two(everybody)
        while places and not self._reserve(lane, places, PLENTY if places > members else 1.0):
            places //= 2
        if not places and not (self._fits(lane, members) and lane.reserve(members, lent=False)):
            return None
        self._lanes.append(lane)
        return lane

    def _reserve(self, lane: Lane, places: int, share: float) -> bool:
        """Whether the lane has lent memory for so many now; lanes that are idle are given up for it."""
        while not (self._fits(lane, places, share) and lane.reserve(places, lent=True)):
            if not self._idle:
                return False
            idle = self._idle.pop(0)
            self._lanes.remove(idle)
            idle.release()
        return True

    def _fits(self, lane: Lane, places: int, share: float = 1.0) -> bool:
        """Whether the lane with so many places keeps to a share of the limit beside the others."""
        others = sum(other.nbytes for other in self._lanes if other is not lane)
        return others + lane.nbytes_for(places) <= share * self._limit

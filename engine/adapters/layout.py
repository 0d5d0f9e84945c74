"""Where each piece of an adapter lies in its chunks. A pure function of ranks and shapes; imports no torch.

Host pages and arena chunks share one layout. Pieces start at multiples of 256 bytes and never straddle chunks.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from operator import itemgetter

import msgspec

from engine.adapters.spec import ModuleSpec
from engine.geometry import PIECE_RANKS, Geometry, piece_bytes
from engine.models.dims import LORA_MODULES, ModelDims

RANK_ALIGN = 8  # ranks of a piece are padded with zeros to a multiple of it
SIDE_A, SIDE_B = 0, 1

Piece = tuple[int, int, int, int, int, int]  # bytes, layer, module, side, rank block, ranks


class Place(msgspec.Struct, frozen=True, gc=False):
    """One piece: A as [ranks, in] or B as [out, ranks], row-major, at `offset` bytes of the adapter's chunk."""

    layer: int
    module: int  # position in LORA_MODULES
    side: int  # SIDE_A or SIDE_B
    rank_block: int  # holds the ranks from 16 * rank_block on
    ranks: int  # as stored: 16 or 8
    chunk: int  # index into the adapter's own chunks
    offset: int  # bytes


class Layout(msgspec.Struct, frozen=True):
    """All pieces of one adapter."""

    chunks: int
    places: tuple[Place, ...]
    piece_bytes: int  # of all pieces, alignment included
    chunk_bytes: int

    @property
    def bytes(self) -> int:
        """What the adapter takes in the arena, and in host memory."""
        return self.chunks * self.chunk_bytes

    @property
    def waste(self) -> float:
        """The share of its chunks that holds no piece."""
        return 1 - self.piece_bytes / self.bytes


def stored_ranks(rank: int) -> int:
    """A module's rank as stored, a multiple of 8."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


def pack(modules: Iterable[ModuleSpec], dims: ModelDims, geometry: Geometry) -> Layout:
    """Lay the pieces of these modules into as few chunks as best-fit decreasing finds; deterministic."""
    pieces = [piece for module in modules for piece in _pieces(module, dims, geometry.itemsize)]
    pieces.sort(key=itemgetter(0), reverse=True)
    bins = _Bins(geometry.chunk_bytes)
    places = tuple(_place(piece, bins) for piece in pieces)
    return Layout(bins.count, places, sum(piece[0] for piece in pieces), geometry.chunk_bytes)


def _place(piece: Piece, bins: "_Bins") -> Place:
    size, layer, module, side, block, ranks = piece
    chunk, offset = bins.take(size)
    return Place(layer, module, side, block, ranks, chunk, offset)


def _pieces(module: ModuleSpec, dims: ModelDims, itemsize: int) -> Iterator[Piece]:
    features = dims.module_shape(LORA_MODULES[module.module])
    stored = stored_ranks(module.rank)
    for block, first in enumerate(range(0, stored, PIECE_RANKS)):
        ranks = min(PIECE_RANKS, stored - first)
        for side in (SIDE_A, SIDE_B):
            size = piece_bytes(ranks, features[side], itemsize)
            yield size, module.layer, module.module, side, block, ranks


class _Bins:
    """Open chunks by free bytes. Few sizes of pieces exist, so few distinct amounts of free bytes do."""

    def __init__(self, chunk_bytes: int) -> None:
        self.count = 0
        self._chunk_bytes = chunk_bytes
        self._sizes: list[int] = []  # free bytes of open chunks, ascending, each once
        self._open: dict[int, list[int]] = {}  # free bytes -> chunks

    def take(self, size: int) -> tuple[int, int]:
        """(chunk, offset) of a new piece, in the chunk that it leaves least free."""
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            free, chunk = self._chunk_bytes, self.count
            self.count += 1
        else:
            free = self._sizes[at]
            chunk = self._open[free].pop()
            if not self._open[free]:
                del self._open[free], self._sizes[at]
        self._put_back(chunk, free - size)
        return chunk, self._chunk_bytes - free

    def _put_back(self, chunk: int, free: int) -> None:
        if free not in self._open:
            insort(self._sizes, free)
            self._open[free] = []
        self._open[free].append(chunk)

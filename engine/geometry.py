"""Sizes of the arena's chunks, from the model's shape alone: pure numbers that all parts share."""

from collections import Counter
from dataclasses import dataclass

from engine.models.dims import LORA_MODULES, ModelDims

PIECE_RANKS = 16  # ranks of a full piece
PIECE_ALIGN = 256  # bytes; offsets of pieces and sizes of chunks are multiples of it
MIN_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Geometry:
    """One KV block over all layers fills a chunk; an adapter's pieces lie in chunks of the same size."""

    block_tokens: int
    chunk_bytes: int
    itemsize: int  # bytes an element

    @property
    def chunk_elements(self) -> int:
        return self.chunk_bytes // self.itemsize

    def blocks(self, tokens: int) -> int:
        """How many chunks the KV of that many tokens takes."""
        return -(-tokens // self.block_tokens)

    def adapter_chunks(self, dims: ModelDims, rank: int, modules: tuple[str, ...] = LORA_MODULES) -> int:
        """Upper bound of the chunks of an adapter with this rank on these modules in every layer."""
        full, last = divmod(-(-rank // 8) * 8, PIECE_RANKS)
        pieces = Counter[int]()
        for features in (f for module in modules for f in dims.module_shape(module)):
            pieces[piece_bytes(PIECE_RANKS, features, self.itemsize)] += full * dims.layers
            if last:
                pieces[piece_bytes(last, features, self.itemsize)] += dims.layers
        return sum(-(-count // (self.chunk_bytes // size)) for size, count in pieces.items())


def piece_bytes(ranks: int, features: int, itemsize: int) -> int:
    """Bytes that one A or B block of a module takes in a chunk."""
    return _align(ranks * features * itemsize)


def make_geometry(dims: ModelDims, itemsize: int) -> Geometry:
    """The smallest power of two of tokens, from 16, whose chunk holds twice the largest piece."""
    largest = max(max(dims.module_shape(module)) for module in LORA_MODULES)
    needed = 2 * piece_bytes(PIECE_RANKS, largest, itemsize)
    tokens = MIN_BLOCK_TOKENS
    while (chunk := _align(dims.kv_elements_per_token * tokens * itemsize)) < needed:
        tokens *= 2
    return Geometry(block_tokens=tokens, chunk_bytes=chunk, itemsize=itemsize)


def _align(size: int) -> int:
    return -(-size // PIECE_ALIGN) * PIECE_ALIGN

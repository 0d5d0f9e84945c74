"""How KV blocks and adapter pieces lie in the arena, for kernels and references alike. Plain numbers, no triton."""

from dataclasses import dataclass

PIECE_RANKS = 16  # ranks of a full piece; an adapter-module's last piece may hold 8
PIECE_UNIT = 256  # bytes; the unit of the piece table's offsets


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One chunk of KV: `[layers, 2 (K, V), kv_heads, block_tokens, head_dim]`, row-major from the chunk's start."""

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim

    @property
    def layer_elements(self) -> int:
        """Elements of one layer's keys and values in a chunk."""
        return 2 * self.kv_heads * self.block_tokens * self.head_dim

    @property
    def elements(self) -> int:
        return self.layers * self.layer_elements


def piece_unit(itemsize: int) -> int:
    """Elements in one unit of the piece table's offsets."""
    return PIECE_UNIT // itemsize

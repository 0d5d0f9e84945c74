"""Attention's work lists, built on the host: query tiles of prefills, spans of keys of decodes. Imports no triton.

How a sequence is cut depends on its own lengths and on the bucket, never on who shares the batch, so that its sums are
taken in the same order whoever does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.lora_meta import DECODE_ITEMS, DECODE_SEQUENCES, PREFILL_ITEMS, Ints

PREFILL_INTS = 4  # block table's row, first row of q, tokens, position of the first
DECODE_INTS = 8  # row of q, block table's row, first key, end of keys, 1 if the sequence is not split, 0, 0, 0
SEQUENCE_INTS = 4  # row of q, first item, items, 0
SPAN = 64  # keys; spans are multiples of it
MIN_SPAN, MAX_SPAN = 128, 2048  # keys of one decode item, as far as MAX_PARTS allows
MAX_PARTS = 16  # items of one decode in a bucket that does not cut finer anyway


@dataclass(frozen=True, slots=True)
class AttentionBounds:
    """Sizes of the attention lists of one bucket."""

    tokens: int  # rows of the bucket
    sequences: int
    q_tile: int  # tokens of a prefill item, from kernels.launch.q_tile; a bucket of decodes alone has 0
    splits: int  # parts that a decode of middling length is cut into
    max_context: int  # tokens; longer ones than MAX_SPAN are cut further

    @property
    def prefill_items(self) -> int:
        return -(-self.tokens // self.q_tile) + self.sequences if self.q_tile else 0

    @property
    def decode_grid(self) -> int:
        """Programs for each KV head; a step with more items has each take several."""
        return self.sequences * self.splits

    @property
    def max_parts(self) -> int:
        return max(self.splits, min(MAX_PARTS, -(-self.max_context // MAX_SPAN)))

    @property
    def decode_items(self) -> int:
        return self.sequences * self.max_parts

    def fields(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The attention part of a PackedLayout."""
        return (
            ("prefill_items", (self.prefill_items, PREFILL_INTS)),
            ("decode_items", (self.decode_items, DECODE_INTS)),
            ("decode_sequences", (self.sequences, SEQUENCE_INTS)),
        )


def decode_splits(sequences: int, kv_heads: int, multiprocessors: int) -> int:
    """Parts of each decode in a bucket of that many: about two programs a multiprocessor, at most 32 parts."""
    programs = sequences * kv_heads
    return 1 if 2 * programs >= 3 * multiprocessors else min(32, -(-2 * multiprocessors // programs))


def decode_bounds(sequences: int, kv_heads: int, multiprocessors: int, max_context: int) -> AttentionBounds:
    """A bucket of decodes alone."""
    splits = decode_splits(sequences, kv_heads, multiprocessors)
    return AttentionBounds(sequences, sequences, 0, splits, max_context)


def pack_attention(
    fields: dict[str, Ints],  # host views of the packed layout, `counts` among them
    bounds: AttentionBounds,
    table_rows: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    window: int = 0,
) -> None:
    """Fill the attention lists in place.

    For each sequence, in batch order: its row of the block tables, the position of its first token of this step, and
    how many tokens the step computes. One token is a decode, more are a prefill. window: keys seen, 0: all.
    """
    spans = np.array([table_rows, starts, lengths], np.int32).reshape(3, -1)
    first = np.cumsum(spans[2]) - spans[2]
    # Where the bucket has no prefill list, it has none but decodes.
    decode = spans[2] == 1
    _pack_prefill(fields, bounds.q_tile, spans[:, ~decode], first[~decode])
    _pack_decode(fields, bounds, spans[:2, decode], first[decode], window)


def _pack_prefill(fields: dict[str, Ints], tile: int, spans: Ints, first: Ints) -> None:
    """Longest contexts first: a causal tile's cost grows with its position, and the small ones fill the gaps."""
    rows, starts, lengths = spans
    tiles = -(-lengths // max(tile, 1))
    owner = np.repeat(np.arange(len(rows)), tiles)
    nth = (np.arange(len(owner)) - (np.cumsum(tiles) - tiles)[owner]) * tile
    tokens = np.minimum(lengths[owner] - nth, tile)
    items = np.stack([rows[owner], first[owner] + nth, tokens, starts[owner] + nth], 1).astype(np.int32)
    fields["prefill_items"][: len(items)] = items[np.argsort(-items[:, 3], kind="stable")]
    fields["counts"][PREFILL_ITEMS] = len(items)


def _pack_decode(fields: dict[str, Ints], bounds: AttentionBounds, spans: Ints, first: Ints, window: int) -> None:
    rows, positions = spans
    begin = np.maximum(0, positions + 1 - window) if window else np.zeros_like(positions)
    keys = positions + 1 - begin
    wanted = np.clip(-(-keys // MAX_SPAN), bounds.splits, bounds.max_parts)
    span = np.maximum(-(-keys // (wanted * SPAN)) * SPAN, MIN_SPAN)
    parts = -(-keys // span)
    owner = np.repeat(np.arange(len(rows)), parts)
    start = np.cumsum(parts) - parts
    low = begin[owner] + (np.arange(len(owner)) - start[owner]) * span[owner]
    items = fields["decode_items"][: len(owner)]
    items[:, 0], items[:, 1], items[:, 2] = first[owner], rows[owner], low
    items[:, 3] = np.minimum(low + span[owner], positions[owner] + 1)
    items[:, 4] = parts[owner] == 1
    sequences = fields["decode_sequences"][: len(rows)]
    sequences[:, 0], sequences[:, 1], sequences[:, 2] = first, start, parts
    fields["counts"][DECODE_ITEMS], fields["counts"][DECODE_SEQUENCES] = len(owner), len(rows)


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """A bucket's attention metadata on the device, and the scratch of its split decodes."""

    bounds: AttentionBounds
    counts: Tensor  # [HEADER] int32
    prefill_items: Tensor  # [prefill_items, PREFILL_INTS] int32
    decode_items: Tensor  # [decode_items, DECODE_INTS] int32
    decode_sequences: Tensor  # [sequences, SEQUENCE_INTS] int32
    block_tables: Tensor  # [rows, max_blocks] int32, chunk ids
    partial: Tensor  # [elements] float32: outputs of split decodes, [decode_items, heads, head_dim]
    partial_lse: Tensor  # [elements] float32: log2 of their sums of exponents, [decode_items, heads]


@dataclass(frozen=True, slots=True)
class AttentionWorkspace:
    """Scratch that every bucket shares: sized for the largest."""

    partial: Tensor  # [elements] float32
    partial_lse: Tensor  # [elements] float32

    @classmethod
    def allocate(
        cls, buckets: Sequence[AttentionBounds], heads: int, head_dim: int, device: torch.device
    ) -> "AttentionWorkspace":
        rows = max(b.decode_items for b in buckets) * heads

        def floats(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        return cls(floats(rows * head_dim), floats(rows))

    def meta(self, bounds: AttentionBounds, fields: dict[str, Tensor], block_tables: Tensor) -> AttentionMeta:
        """A bucket's metadata over this scratch; `fields` are the device views of its packed layout."""
        return AttentionMeta(
            bounds,
            fields["counts"],
            fields["prefill_items"],
            fields["decode_items"],
            fields["decode_sequences"],
            block_tables,
            self.partial,
            self.partial_lse,
        )

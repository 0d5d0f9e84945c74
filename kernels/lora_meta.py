"""What a step tells the kernels, built on the host: one packed int32 array, its layout, and the LoRA work lists in it.

The worker fills the host array and copies it to the device once a step. Lists carry their length in the header
`counts`; what lies beyond the length is never read, so a captured graph needs no cleared tails. Imports no triton.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.layout import PIECE_RANKS

Ints = npt.NDArray[np.int32]

# Positions in the header `counts`.
LORA_WORK, LORA_ITEMS, PREFILL_ITEMS, DECODE_ITEMS, DECODE_SEQUENCES = range(5)
LORA_ROWS = (8, 12, 16, 20)  # of each group; kernels are given their addresses, and are compiled once for aligned ones
HEADER = 24
WORK_INTS = 8  # first row, rows, slot, rank block, item, 0, 0, 0
ITEM_INTS = 4  # first row, rows, slot, 0
BLOCK_INTS = 4  # first row, one past the last, an item, rank block
TILE_INTS = 8  # first block, one past the last, 0, 0; the first block as above
LARGE_ROWS = 128  # of a tile of the products of large steps
LARGE_TOKENS = 1024  # of the smallest large step: its products take their deltas in, tile by tile
LORA_MODULES = 7
GROUP_STARTS = (0, 3, 4, 6)  # first module of each group that reads one input: qkv, o, gate_up, down
ALIGN = 4  # int32 elements; every field starts at a multiple of 16 bytes


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Names, shapes and places of the fields of one packed int32 array; `counts` comes first in every layout."""

    fields: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        """int32 elements."""
        return sum(_padded(shape) for _, shape in self.fields)

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """Views of each field in a packed tensor, on the host (`.numpy()` shares memory) or the device."""
        views, at = {}, 0
        for name, shape in self.fields:
            views[name] = packed[at : at + prod(shape)].view(shape)
            at += _padded(shape)
        return views


def _padded(shape: tuple[int, ...]) -> int:
    return -(-prod(shape) // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Modules that read the same input, computed by one shrink and one expand."""

    first: int  # index of its first module; the others follow
    inner: int  # in features
    features: tuple[int, ...]  # out features of each: 3 modules (qkv), 2 (gate_up) or 1

    @property
    def index(self) -> int:
        return GROUP_STARTS.index(self.first)


@dataclass(frozen=True, slots=True)
class LoraBounds:
    """Sizes of the LoRA lists of one bucket: they bound what a step may hold, they do not set what it costs."""

    tokens: int  # rows of the bucket
    tile: int  # rows of a work item: 8, 16, 32, 64 or 128
    slots: int  # adapters that a step may use at once
    rank_blocks: int  # of the largest adapter allowed

    @property
    def items(self) -> int:
        return -(-self.tokens // self.tile) + min(self.slots, self.tokens)

    @property
    def work(self) -> int:
        return self.items * self.rank_blocks

    @property
    def large(self) -> bool:
        return self.tokens >= LARGE_TOKENS

    def fields(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The LoRA part of a PackedLayout."""
        lists = ("lora_items", (self.items, ITEM_INTS)), ("lora_work", (self.work, WORK_INTS))
        if not self.large:
            return lists
        blocks, tiles = min(self.slots, self.tokens) * self.rank_blocks, -(-self.tokens // LARGE_ROWS)
        return *lists, ("lora_blocks", (blocks, BLOCK_INTS)), ("lora_tiles", (tiles, TILE_INTS))


def pack_lora(
    fields: Mapping[str, Ints],
    groups: Sequence[tuple[int, int]] | npt.NDArray[np.integer],
    slot_blocks: Ints,  # [slots, groups], most rank blocks that the slot's adapter has in any of the modules and layers
    tile: int,
) -> None:
    """Fill the LoRA lists, and their lengths in `counts`.

    groups: (slot, tokens) of the adapters' rows in batch order; rows lie together by slot from row 0 on, the base's
    come last and are not listed. An item is at most `tile` rows of one slot, a unit of work one rank block of an item.
    A group that none of the adapters has counts no rows: nothing of it is computed or added.
    """
    counts, items, work = (fields[name] for name in ("counts", "lora_items", "lora_work"))
    slots, tokens = np.array(groups, np.int32).reshape(-1, 2).T
    starts, tiles = np.cumsum(tokens) - tokens, -(-tokens // tile)
    owner, nth = _spread(tiles)  # each item's group
    lora = items[: len(owner)]
    lora[:, 0] = starts[owner] + nth * tile
    lora[:, 1] = np.minimum(tokens[owner] - nth * tile, tile)
    lora[:, 2] = slots[owner]
    item, block = _spread(np.maximum(slot_blocks[lora[:, 2]].max(1), 1))
    units = work[: len(item)]
    units[:, :3] = lora[item, :3]
    units[:, 3] = block
    units[:, 4] = item
    counts[LORA_WORK], counts[LORA_ITEMS] = len(item), len(owner)
    counts[list(LORA_ROWS)] = np.where(slot_blocks[slots].any(0), tokens.sum(), 0)
    if "lora_tiles" in fields:
        runs = np.stack([starts, starts + tokens, np.cumsum(tiles) - tiles], 1)
        _pack_tiles(fields["lora_blocks"], fields["lora_tiles"], runs, slot_blocks[slots].max(1))


def _spread(counts: Ints) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Things of which counts[i] are i's: whose each is, and its number among them."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _pack_tiles(blocks: Ints, tiles: Ints, runs: Ints, counts: Ints) -> None:
    """The rank blocks whose rows each tile of a product has some of.

    runs: [slots, 3], first row of each slot, one past its last, its first item; counts: [slots], its rank blocks.
    """
    rows, (run, block) = np.arange(len(tiles)) * LARGE_ROWS, _spread(counts)
    used = blocks[: len(run)]
    used[:, :3] = runs[run]
    used[:, 3] = block
    tiles[:, 0] = np.searchsorted(used[:, 1], rows, "right")
    tiles[:, 1] = np.searchsorted(used[:, 0], rows + LARGE_ROWS)
    tiles[:, 2:] = 0
    has = tiles[:, 0] < tiles[:, 1]
    tiles[has, 4:] = used[tiles[has, 0]]


@dataclass(frozen=True, slots=True)
class LoraMeta:
    """A bucket's LoRA metadata on the device. The launchers take their work from it and their grids from `bounds`."""

    bounds: LoraBounds
    counts: Tensor  # [HEADER] int32
    items: Tensor  # [items, ITEM_INTS] int32
    work: Tensor  # [work, WORK_INTS] int32
    shrink_desc: Tensor  # [work, layers * 7, 2] int32: offset of A's piece, its ranks (0: nothing to do)
    expand_desc: Tensor  # [items, layers * 7, 1 + rank_blocks] int32: rank, offsets of B's pieces
    z: Tensor  # [elements] float32: partial products, in each launch [tokens, modules, rank_blocks, splits, 16]
    blocks: Tensor | None = None  # [blocks, BLOCK_INTS] int32: in large steps
    tiles: Tensor | None = None  # [tiles of LARGE_ROWS rows, TILE_INTS] int32: which blocks each has rows of
    known: Sequence[int] | None = None  # rows of each group, where what is launched is for one step; None: for a graph

    @property
    def max_rank(self) -> int:
        return self.bounds.rank_blocks * PIECE_RANKS

    def rows(self, group: LoraGroup) -> Tensor:
        """[1] int32: the step's first rows, which a delta of the group is computed for; 0 where no adapter has it."""
        at = LORA_ROWS[group.index]
        return self.counts[at : at + 1]


@dataclass(frozen=True, slots=True)
class LoraWorkspace:
    """Scratch that every bucket shares, since steps run one after the other: sized for the largest bucket."""

    shrink_desc: Tensor  # [elements] int32
    expand_desc: Tensor  # [elements] int32
    z: Tensor  # [elements] float32

    @classmethod
    def allocate(cls, buckets: Sequence[LoraBounds], layers: int, device: torch.device) -> "LoraWorkspace":
        def ints(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            ints(max(b.work for b in buckets) * layers * LORA_MODULES * 2),
            ints(max(b.items * (1 + b.rank_blocks) for b in buckets) * layers * LORA_MODULES),
            torch.zeros(max(z_elements(b) for b in buckets), dtype=torch.float32, device=device),
        )

    def meta(self, bounds: LoraBounds, fields: dict[str, Tensor], layers: int) -> LoraMeta:
        """A bucket's metadata over this scratch; `fields` are the device views of its packed layout."""
        modules = layers * LORA_MODULES
        shrink = self.shrink_desc[: bounds.work * modules * 2].view(bounds.work, modules, 2)
        row = 1 + bounds.rank_blocks
        expand = self.expand_desc[: bounds.items * modules * row].view(bounds.items, modules, row)
        return LoraMeta(
            bounds, fields["counts"], fields["lora_items"], fields["lora_work"], shrink, expand, self.z,
            blocks=fields.get("lora_blocks"), tiles=fields.get("lora_tiles"),
        )  # fmt: skip


MAX_SPLITS = 16  # parts of the inner dimension in a shrink


def z_elements(bounds: LoraBounds) -> int:
    """Elements of scratch that any shrink of the bucket needs: three merged modules, every split."""
    return split_bound(bounds) * bounds.tokens * 3 * bounds.rank_blocks * PIECE_RANKS


def split_bound(bounds: LoraBounds) -> int:
    """Most parts of the inner dimension that a bucket's shrinks may use: many where few rows leave the device idle."""
    if bounds.tile > 16:
        return 1
    if bounds.tokens > LARGE_TOKENS:
        return 2  # their many rows are programs enough, and gate_up's product adds the parts up for every tile
    splits = min(MAX_SPLITS, 8192 // bounds.tokens)
    return 1 << (splits.bit_length() - 1)  # a power of two, so that few kernels are compiled

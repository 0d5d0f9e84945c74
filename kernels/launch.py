"""What launchers share: sizes of grids and tiles, from static shapes alone so that captured graphs stay valid."""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora_meta import LARGE_ROWS, LoraBounds, LoraGroup, split_bound

DECODE_TOKENS = 256  # of the largest decode step in a graph, unless a flag says otherwise
NARROW_TILE, DECODE_TILE, PREFILL_TILE = 8, 16, 64  # rows of a LoRA work item: up to PRODUCT_ROWS, SMALL_STEP, above
SMALL_STEP = 2048  # tokens of the largest small step: an item of few rows costs as much as its tile
PRODUCT_ROWS, PRODUCT_PARTS = 64, 2  # of the largest product that is ours, and the most parts it is made in
TMA_ROWS = 96  # of a product above which it pays to load tiles whole
PRODUCT_MEMORY, SHARED_MEMORY = 222 << 10, 132 << 10  # bytes of a multiprocessor's that a product takes, alone and not
SHARED_REGISTERS = 168  # a thread's, of a product whose sums are large: an expand has to fit beside it
DECODE_KEYS = 16  # of a tile of decode attention; any block holds whole ones
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device that a launch goes to; the CPU (Triton's interpreter) counts as 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether tiles may be copied whole: from compute capability 9 on, and in Triton's interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def require(condition: bool, message: str) -> None:
    """Refuse arguments that a kernel would read wrongly."""
    if not condition:
        raise ValueError(message)


def require_rows(*tensors: Tensor) -> None:
    """Each tensor is of a supported dtype and its last dimension is contiguous."""
    for tensor in tensors:
        require(tensor.dtype in DTYPES, f"dtype {tensor.dtype} is not supported")
        require(tensor.stride(-1) == 1, "the last dimension must be contiguous")


def dependent(on: bool) -> dict[str, bool]:
    """Launch option of a kernel that may start before the one ahead of it ends, and waits for it by itself."""
    return {"launch_pdl": True} if on else {}


def kept(on: bool) -> str:
    """Eviction policy of what a kernel stores for a later one; every launcher's `keep` asks for it.

    Kept, it outlasts in the second-level cache the weights that pass meanwhile. Otherwise it would be written to
    memory, needed there or not, and perhaps be read from there.
    """
    return "evict_last" if on else ""


def limited(registers: int | None) -> dict[str, int]:
    """Launch option of a kernel whose threads take so many registers at most."""
    return {} if registers is None else {"maxnreg": registers}


def lora_tile(tokens: int, *, prefill: bool, narrow: bool = False) -> int:
    """Rows of a LoRA work item in a bucket of so many tokens. narrow: of one for steps as `narrow_items` has them."""
    if tokens <= PRODUCT_ROWS or narrow:
        return NARROW_TILE
    return PREFILL_TILE if prefill and tokens > SMALL_STEP else DECODE_TILE


def narrow_items(rows: Collection[int]) -> bool:
    """Whether adapters with so many rows each are hardly more items of NARROW_TILE than of DECODE_TILE rows.

    Then these cost less; otherwise they read the adapters twice.
    """
    narrow, wide = (sum(cdiv(count, tile) for count in rows) for tile in (NARROW_TILE, DECODE_TILE))
    return 4 * narrow <= 5 * wide


@dataclass(frozen=True, slots=True)
class ShrinkTiles:
    """merged: one program computes all modules of its rows, so that x is read once. blocks: their rank blocks, too."""

    inner: int
    splits: int
    merged: bool
    warps: int
    stages: int
    blocks: int = 1


def shrink_splits(tokens: int, group: LoraGroup) -> int:
    """Parts of the inner dimension at decode: more end sooner, and make expand read more.

    So small steps, and expands of few columns (o, down), bear more. Above 128 tokens the product waits for shrink to
    end: parts of 1,024 inner features.
    """
    if tokens > 128:
        return power_of_two(cdiv(group.inner, 1024))
    most = {3: 16, 2: 32}.get(len(group.features), 128)  # tokens of a step with 8 parts
    return 8 if tokens <= most else 4


def shrink_tiles(bounds: LoraBounds, group: LoraGroup, itemsize: int) -> ShrinkTiles:
    """Small tiles split the inner dimension to have enough programs; large ones read x once for all modules."""
    narrow = 2 if itemsize == 4 else 1
    if bounds.tile < PREFILL_TILE:
        # Beside a product that leaves little memory, and where there are many: smaller tiles, more of them under way.
        small = 16 < bounds.tokens <= PRODUCT_ROWS or bounds.tokens > DECODE_TOKENS
        inner, stages = (128, 4) if small else (256, 3)
        splits = min(split_bound(bounds), shrink_splits(bounds.tokens, group), cdiv(group.inner, 256))
        return ShrinkTiles(inner // narrow, splits, False, 2 if bounds.tokens > 128 else 4, stages)
    modules = len(group.features)
    blocks = min(power_of_two(bounds.rank_blocks), 8 // narrow // power_of_two(modules))  # sums: 128 ranks at most
    return ShrinkTiles(64 // narrow, 1, modules > 1, 4, 4, blocks)


@dataclass(frozen=True, slots=True)
class ExpandTiles:
    """each: programs a multiprocessor; units of work beyond that are taken in turns."""

    columns: int
    warps: int
    stages: int
    each: int = 8


def expand_tiles(bounds: LoraBounds, itemsize: int) -> ExpandTiles:
    narrow, wide = (128, 256) if itemsize == 4 else (256, 512)
    if bounds.tile == PREFILL_TILE:
        return ExpandTiles(narrow, 4, 2, each=32)
    if 32 < bounds.tokens <= PRODUCT_ROWS:  # few programs find room beside the product: more under way in each
        return ExpandTiles(wide, 2, 2)
    if bounds.tokens <= (PRODUCT_ROWS if bounds.tile == NARROW_TILE else 2 * PRODUCT_ROWS):
        return ExpandTiles(narrow, 4, 2)
    return ExpandTiles(wide, 4, 2 if bounds.rank_blocks > 1 else 1)  # with one block a pipeline has nothing to do


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """programs: shares of the output features; parts: of the inner dimension; columns, rows, inner: of a tile.

    registers: a thread's at most; tma: loads tiles whole.
    """

    programs: int
    parts: int
    columns: int
    rows: int
    inner: int
    warps: int
    stages: int
    registers: int | None = None
    tma: bool = False


def product_tiles(
    rows: int,
    features: int,
    inner: int,
    multiprocessors: int,
    *,
    summed: bool,
    shared: bool = False,
    itemsize: int = 2,
) -> ProductTiles:
    """One program a multiprocessor, each with as many bytes to read as the others, a few tiles of them under way.

    summed: the reader adds parts up, so that a weight of few output features still fills a tile. shared: shrink and
    expand are to find room beside it; with more than 64 rows the room is worth more to the product. It keeps four
    tiles under way even so: with two, a product alone is a sixth slower. Nearly full tiles of 128 rows come by TMA.
    """
    parts = PRODUCT_PARTS if summed and 16 < cdiv(features, multiprocessors) <= 32 and inner >= 2048 else 1
    programs = max(1, multiprocessors // parts)
    programs = min(programs * cdiv(features, programs * 256), cdiv(features, 16))
    columns, tile = max(64, power_of_two(cdiv(features, programs))), max(16, power_of_two(rows))
    memory = SHARED_MEMORY if shared and tile <= 64 else PRODUCT_MEMORY
    line, least = (columns + tile) * itemsize, 4 if shared else 3
    wide = 128 if line * 128 * least <= memory else 64
    stages = max(least, min(6, memory // (line * wide)))
    tma = rows > TMA_ROWS and inner * itemsize % 16 == 0
    warps = 8 if columns > 128 or columns * tile > (8192 if tma else 4096) else 4
    registers = SHARED_REGISTERS if shared and tile <= 64 and columns * tile > 8192 else None
    return ProductTiles(programs, parts, columns, tile, wide, warps, stages, registers, tma)


@dataclass(frozen=True, slots=True)
class LargeTiles:
    """columns: of either half; together: rows of tiles that are taken beside each other."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    together: int

    def count(self, rows: int, features: int) -> int:
        """Of a product of so many rows and output features."""
        return cdiv(rows, self.rows) * cdiv(features, 2 * self.columns)


def large_tiles(itemsize: int) -> LargeTiles:
    """Sums of 128 registers a thread, and inputs that leave a multiprocessor room for the result's tile."""
    return LargeTiles(LARGE_ROWS, 128, 128 // itemsize, 8, 3, 8)


def large_fill(tokens: int, features: int, itemsize: int, multiprocessors: int) -> float:
    """A large product's tiles over what the turns hold in which multiprocessors take them: 1 where the last is full."""
    count = large_tiles(itemsize).count(tokens, features)
    return count / (cdiv(count, multiprocessors) * multiprocessors)


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """rows: query rows (tokens times heads of one KV head) of a program; keys: keys read at a time.

    registers: at most, of a thread, so that another program has its own.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def prefill_tiles(head_dim: int, itemsize: int, long: bool) -> AttentionTiles:
    """Query and key tiles that fit the shared memory of one multiprocessor; the rows are the same for both `long`.

    Up to heads of 128 two programs share one, which compute and wait in turns. Small key tiles waste less at the
    diagonal and have another under way, large ones take fewer turns: they are for long contexts.
    """
    if itemsize == 4:
        return AttentionTiles(32, 32 if head_dim <= 128 else 16, 8, 1)
    if head_dim <= 128:
        return AttentionTiles(128, 64, 8, 2, 128) if long else AttentionTiles(128, 32, 8, 3, 128)
    return AttentionTiles(64, 64, 8, 2)


def decode_tiles(group: int, head_dim: int, itemsize: int, each: float) -> AttentionTiles:
    """each: programs of the launch for each multiprocessor; where they are few, two warps end sooner.

    A tile is what lies together in any block. Few are under way, so that the product behind finds room to start. Sums
    and lines that are large for one warp take four.
    """
    rows = max(8, power_of_two(group))
    if itemsize == 4 or head_dim > 128 or rows > 16:
        return AttentionTiles(rows, DECODE_KEYS, 4, 4 if head_dim * itemsize <= 512 else 2)
    warps, stages = (2, 4) if each <= 4 or rows > 8 else (1, 3)
    return AttentionTiles(rows, DECODE_KEYS, warps, stages)


def q_tile(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Tokens of one prefill item: what its program's rows hold of whole GQA groups.

    Raises ValueError where one token's group does not fit.
    """
    group = heads // kv_heads
    tile = prefill_tiles(head_dim, itemsize, long=False).rows // group
    require(tile >= 1 and heads == group * kv_heads, f"{heads} heads over {kv_heads} KV heads are not supported")
    return tile

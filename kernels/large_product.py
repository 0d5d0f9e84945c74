"""Products of many rows, with LoRA's delta and what follows done while their sums are in registers.

So neither the delta nor, of gate and up, what the product makes is written and read again. A tile's inputs come by TMA;
one program a multiprocessor takes tiles in turns.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import large_tiles, multiprocessors, require, require_rows, shrink_tiles
from kernels.layout import piece_unit
from kernels.lora_meta import BLOCK_INTS, LORA_MODULES, TILE_INTS, LoraGroup, LoraMeta
from kernels.silu_mul import silu_times


@triton.jit
def _head(lora, line, mask):
    """Of a rank block: first row, one past the last, number, and for either half the rank and B's place."""
    _arena, _z, _z_row, _z_half, desc, desc_stride, desc_half = lora
    begin, end = tl.load(line, mask=mask, other=0), tl.load(line + 1, mask=mask, other=0)
    item, number = tl.load(line + 2, mask=mask, other=0), tl.load(line + 3, mask=mask, other=0)
    left = desc + item.to(tl.int64) * desc_stride
    right = left + desc_half
    left_rank, left_place = tl.load(left), tl.load(left + 1 + number)
    right_rank, right_place = tl.load(right), tl.load(right + 1 + number)
    return begin, end, number, left_rank, left_place, right_rank, right_place


@triton.jit
def _load(
    lora, head, row, column, other, size, UNIT: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """What a rank block adds to the halves of a tile: for each z [SPLITS, BM, 16], zero in others' rows, B [BN, 16] and
    its width. column, other: the halves' first columns in their modules of `size` columns.
    """
    arena, z, z_row, z_half, _desc, _desc_stride, _desc_half = lora
    begin, end, number, left_rank, left_place, right_rank, right_place = head
    row += tl.arange(0, BM)
    own = ((row >= begin) & (row < end))[:, None]
    z += row.to(tl.int64)[:, None] * z_row + number * (16 * SPLITS)
    left_z, left_b, left_width = _side(
        arena, left_place, left_rank - number * 16, z, own, column, size, UNIT, SPLITS, BN
    )  # fmt: skip
    right_z, right_b, right_width = _side(
        arena, right_place, right_rank - number * 16, z + z_half, own, other, size, UNIT, SPLITS, BN
    )  # fmt: skip
    return left_z, left_b, left_width, right_z, right_b, right_width


@triton.jit
def _side(arena, place, ranks, z, own, column, size, UNIT: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr):
    """z, B and its width of one of the two; ranks: from the block's first on."""
    r = tl.arange(0, 16)
    width = tl.multiple_of(tl.minimum(tl.maximum(ranks, 0), 16), 8)
    column += tl.arange(0, BN)
    held = (r // 8 * 8 < width)[None, :]
    b = arena + place.to(tl.int64) * UNIT + column[:, None] * width + r[None, :]
    bb = tl.load(b, mask=(column < size)[:, None] & held, other=0.0)
    splits = (tl.arange(0, SPLITS) * 16)[:, None, None]
    return tl.load((z + r[None, :])[None, :, :] + splits, mask=(own & held)[None, :, :], other=0.0), bb, width


@triton.jit
def _add(acc, parts, bb, width):
    """acc + z @ B.T. The loads pass through an operation: bare ones Triton would wait for where they stand."""
    bb = tl.where((tl.arange(0, 16) < width)[None, :], bb, 0.0)
    return tl.dot(tl.sum(parts, 0).to(bb.dtype), tl.trans(bb), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "module"])
def _large_product(
    out,
    x,
    weight,
    bias,
    arena,
    z,
    blocks,
    tiles,
    desc,
    rows,
    size,
    inner,
    module,
    rank_blocks,
    desc_stride,
    desc_half,
    z_row,
    z_half,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    SILU: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_INTS: tl.constexpr,
    TILE_INTS: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One program: tiles in turns, TOGETHER rows of tiles beside each other, so that a weight's is read again soon.

    A tile is two halves of BN output features: the same ones of gate and of up, or neighbours. size: out's columns.
    """
    WIDE: tl.constexpr = BN if SILU else 2 * BN
    down, across = tl.cdiv(rows, BM), tl.cdiv(size, WIDE)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        band = tile // (TOGETHER * across) * TOGETHER
        high = tl.minimum(down - band, TOGETHER)
        within = tile % (TOGETHER * across)
        column = within // high
        row = (band + (within + column) % high) * BM  # a program meets all rows: some have more to add than others
        column *= WIDE
        other = column if SILU else column + BN  # in the right half's module
        beyond = size + column if SILU else other  # of the weight's rows
        if LORA:  # what most tiles have to add is read ahead of the sums: it is there when they are
            lora = (arena, z, z_row, z_half, desc + module * (1 + rank_blocks), desc_stride, desc_half)
            of_tile = tiles + row // BM * TILE_INTS
            first, past = tl.load(of_tile), tl.load(of_tile + 1)
            head = _head(lora, of_tile + 4, first < past)
            left_z, left_b, left_width, right_z, right_b, right_width = _load(
                lora, head, row, column, other, size, UNIT, SPLITS, BM, BN
            )  # fmt: skip
            head = _head(lora, blocks + (first + 1) * BLOCK_INTS, first + 1 < past)
        left = tl.zeros([BM, BN], tl.float32)
        right = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, inner, BK, num_stages=STAGES):
            xx = x.load([row, k])
            left = tl.dot(xx, weight.load([column, k]).T, left, input_precision="ieee")
            right = tl.dot(xx, weight.load([beyond, k]).T, right, input_precision="ieee")
        if LORA:
            left = _add(left, left_z, left_b, left_width)
            right = _add(right, right_z, right_b, right_width)
            for at in tl.range(first + 1, past, num_stages=1):  # few: a pipeline would cost more than it saves
                left_z, left_b, left_width, right_z, right_b, right_width = _load(
                    lora, head, row, column, other, size, UNIT, SPLITS, BM, BN
                )  # fmt: skip
                head = _head(lora, blocks + (at + 1) * BLOCK_INTS, at + 1 < past)
                left = _add(left, left_z, left_b, left_width)
                right = _add(right, right_z, right_b, right_width)
        if BIAS:
            i = column + tl.arange(0, BN)
            left += tl.load(bias + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
            right += tl.load(bias + size + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
        if SILU:
            out.store([row, column], silu_times(left, right).to(out.dtype))
        elif REDUCE:  # by the memory
            out.atomic_add([row, column], left)
            out.atomic_add([row, other], right)
        else:
            out.store([row, column], out.load([row, column]) + left)
            out.store([row, other], out.load([row, other]) + right)


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What shrink of the product's group, launched before, left in meta.z: the product adds that times B.

    Of a large step: others have no lists for the tiles.
    """

    arena: Tensor
    meta: LoraMeta
    layer: int
    group: LoraGroup


def gate_up_silu(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, shrunk: Shrunk | None = None
) -> None:
    """x: [tokens, in], rows contiguous; weight: [2 * size, in] contiguous, gate before up; bias: [2 * size]; out:
    [tokens, size]; all of one dtype, rows of multiples of 16 bytes. The device has TMA (compute capability 9).

    Semantics: y[t, n] = sum_k x[t, k] weight[n, k] (+ bias[n]) (+ the delta that lora_expand would add), in float32;
    out[t, i] = silu(y[t, i]) * y[t, size + i], rounded once.
    """
    require(out.dtype == x.dtype, "out and x differ in dtype")
    _launch(out, x, weight, bias, shrunk, silu=True)


def product_onto(residual: Tensor, x: Tensor, weight: Tensor, shrunk: Shrunk) -> None:
    """As gate_up_silu, but weight: [size, in]; residual: [tokens, size] float32; the group has one module.

    Semantics: residual += x @ weight.T + the delta.
    """
    require(residual.dtype == torch.float32, "the residual is not float32")
    _launch(residual, x, weight, None, shrunk, silu=False)


def _launch(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shrunk: Shrunk | None, *, silu: bool) -> None:
    require_rows(out, x, weight)
    require(x.dtype == weight.dtype and weight.is_contiguous(), "weight and activations do not match")
    (rows, inner), halves = x.shape, 2 if silu else 1
    size = weight.shape[0] // halves
    require(weight.shape[1] == inner and out.shape == (rows, size), "x, weight and out do not fit")
    tiles = large_tiles(x.element_size())
    kernel = _large_product[(min(multiprocessors(x.device), tiles.count(rows, weight.shape[0])),)]
    tensors = (
        TensorDescriptor.from_tensor(out, [tiles.rows, tiles.columns]),
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.inner]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.inner]),
        x if bias is None else bias,
    )
    constants = {
        "BIAS": bias is not None, "SILU": silu, "REDUCE": x.is_cuda, "BLOCK_INTS": BLOCK_INTS, "TILE_INTS": TILE_INTS,
        "UNIT": piece_unit(x.itemsize), "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.inner,
        "STAGES": tiles.stages, "TOGETHER": tiles.together, "num_warps": tiles.warps,
    }  # fmt: skip
    if shrunk is None:
        kernel(*tensors, *[x] * 5, rows, size, inner, *[0] * 6, LORA=False, SPLITS=1, **constants)
        return
    meta, group = shrunk.meta, shrunk.group
    require(rows <= meta.bounds.tokens and group.features == (size,) * halves, "the delta is of another shape")
    require(meta.bounds.large, "the step is too small to have lists for the tiles")
    splits = shrink_tiles(meta.bounds, group, x.element_size()).splits
    kernel(
        *tensors,
        shrunk.arena,
        meta.z,
        meta.blocks,
        meta.tiles,
        meta.expand_desc,
        rows,
        size,
        inner,
        shrunk.layer * LORA_MODULES + group.first,
        meta.bounds.rank_blocks,
        meta.expand_desc.stride(0),
        (halves - 1) * (1 + meta.bounds.rank_blocks),
        halves * meta.max_rank * splits,
        (halves - 1) * meta.max_rank * splits,
        LORA=True,
        SPLITS=splits,
        **constants,
    )

"""The product of gate and up of many rows, with LoRA's delta and SiLU-and-mul done while its sums are in registers.

So neither what the product makes nor its delta is written and read again. A tile's inputs come by TMA; one program a
multiprocessor takes tiles in turns.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import cdiv, gate_up_tiles, multiprocessors, require, require_rows, shrink_tiles
from kernels.layout import piece_unit
from kernels.lora_meta import BLOCK_INTS, LORA_MODULES, TILE_INTS, LoraGroup, LoraMeta
from kernels.silu_mul import silu_times


@triton.jit
def _head(lora, line, mask):
    """Of a rank block: first row, one past the last, number, and for gate and for up the rank and B's place."""
    _arena, _z, _z_split, _max_rank, desc, desc_stride, rank_blocks = lora
    begin, end = tl.load(line, mask=mask, other=0), tl.load(line + 1, mask=mask, other=0)
    item, number = tl.load(line + 2, mask=mask, other=0), tl.load(line + 3, mask=mask, other=0)
    gate = desc + item.to(tl.int64) * desc_stride
    up = gate + 1 + rank_blocks
    gate_rank, gate_place = tl.load(gate), tl.load(gate + 1 + number)
    up_rank, up_place = tl.load(up), tl.load(up + 1 + number)
    return begin, end, number, gate_rank, gate_place, up_rank, up_place


@triton.jit
def _load(lora, head, row, column, size, UNIT: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """What a rank block adds to gate and to up of a tile: for each z [SPLITS, BM, 16], zero in others' rows, B [BN, 16]
    and its width.
    """
    arena, z, z_split, max_rank, _desc, _desc_stride, _rank_blocks = lora
    begin, end, number, gate_rank, gate_place, up_rank, up_place = head
    row += tl.arange(0, BM)
    own = ((row >= begin) & (row < end))[:, None]
    z += row.to(tl.int64)[:, None] * (2 * max_rank) + number * 16
    gate_z, gate_b, gate_width = _side(
        arena, gate_place, gate_rank - number * 16, z, z_split, own, column, size, UNIT, SPLITS, BN
    )  # fmt: skip
    up_z, up_b, up_width = _side(
        arena, up_place, up_rank - number * 16, z + max_rank, z_split, own, column, size, UNIT, SPLITS, BN
    )  # fmt: skip
    return gate_z, gate_b, gate_width, up_z, up_b, up_width


@triton.jit
def _side(
    arena, place, ranks, z, z_split, own, column, size, UNIT: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr
):
    """z, B and its width of one of the two; ranks: from the block's first on."""
    r = tl.arange(0, 16)
    width = tl.multiple_of(tl.minimum(tl.maximum(ranks, 0), 16), 8)
    column += tl.arange(0, BN)
    held = (r // 8 * 8 < width)[None, :]
    b = arena + place.to(tl.int64) * UNIT + column[:, None] * width + r[None, :]
    bb = tl.load(b, mask=(column < size)[:, None] & held, other=0.0)
    splits = (tl.arange(0, SPLITS) * z_split)[:, None, None]
    return tl.load((z + r[None, :])[None, :, :] + splits, mask=(own & held)[None, :, :], other=0.0), bb, width


@triton.jit
def _add(acc, parts, bb, width):
    """acc + z @ B.T. The loads pass through an operation: bare ones Triton would wait for where they stand."""
    bb = tl.where((tl.arange(0, 16) < width)[None, :], bb, 0.0)
    return tl.dot(tl.sum(parts, 0).to(bb.dtype), tl.trans(bb), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "module"])
def _gate_up_silu(
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
    desc_stride,
    rank_blocks,
    z_split,
    max_rank,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
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
    """One program: tiles in turns, TOGETHER rows of tiles beside each other, so that a weight's is read again soon."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(size, BN)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        band = tile // (TOGETHER * across) * TOGETHER
        high = tl.minimum(down - band, TOGETHER)
        within = tile % (TOGETHER * across)
        column = within // high
        row = (band + (within + column) % high) * BM  # a program meets all rows: some have more to add than others
        column *= BN
        if LORA:  # what most tiles have to add is read ahead of the sums: it is there when they are
            lora = (arena, z, z_split, max_rank, desc + module * (1 + rank_blocks), desc_stride, rank_blocks)
            of_tile = tiles + row // BM * TILE_INTS
            first, past = tl.load(of_tile), tl.load(of_tile + 1)
            head = _head(lora, of_tile + 4, first < past)
            gate_z, gate_b, gate_width, up_z, up_b, up_width = _load(
                lora, head, row, column, size, UNIT, SPLITS, BM, BN
            )  # fmt: skip
            head = _head(lora, blocks + (first + 1) * BLOCK_INTS, first + 1 < past)
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, inner, BK, num_stages=STAGES):
            xx = x.load([row, k])
            gate = tl.dot(xx, weight.load([column, k]).T, gate, input_precision="ieee")
            up = tl.dot(xx, weight.load([size + column, k]).T, up, input_precision="ieee")
        if LORA:
            gate = _add(gate, gate_z, gate_b, gate_width)
            up = _add(up, up_z, up_b, up_width)
            for at in tl.range(first + 1, past, num_stages=1):  # few: a pipeline would cost more than it saves
                gate_z, gate_b, gate_width, up_z, up_b, up_width = _load(
                    lora, head, row, column, size, UNIT, SPLITS, BM, BN
                )  # fmt: skip
                head = _head(lora, blocks + (at + 1) * BLOCK_INTS, at + 1 < past)
                gate = _add(gate, gate_z, gate_b, gate_width)
                up = _add(up, up_z, up_b, up_width)
        if BIAS:
            i = column + tl.arange(0, BN)
            gate += tl.load(bias + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + size + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
        out.store([row, column], silu_times(gate, up).to(out.dtype))


@dataclass(frozen=True, slots=True)
class GateUpDelta:
    """What shrink of gate and up, launched before, left in meta.z: the product adds that times B."""

    arena: Tensor
    meta: LoraMeta
    layer: int
    group: LoraGroup


def gate_up_silu(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, delta: GateUpDelta | None = None
) -> None:
    """x: [tokens, in], rows contiguous; weight: [2 * size, in] contiguous, gate before up; bias: [2 * size]; out:
    [tokens, size]; all of one dtype, rows of multiples of 16 bytes. The device has TMA (compute capability 9). delta:
    of a large step.

    Semantics: y[t, n] = sum_k x[t, k] weight[n, k] (+ bias[n]) (+ the delta that lora_expand would add), in float32;
    out[t, i] = silu(y[t, i]) * y[t, size + i], rounded once.
    """
    require_rows(out, x, weight)
    require(x.dtype == weight.dtype == out.dtype and weight.is_contiguous(), "weight and activations do not match")
    (rows, inner), size = x.shape, weight.shape[0] // 2
    require(weight.shape[1] == inner and out.shape == (rows, size), "x, weight and out do not fit")
    tiles = gate_up_tiles(x.element_size())
    programs = cdiv(rows, tiles.rows) * cdiv(size, tiles.columns)
    kernel = _gate_up_silu[(min(multiprocessors(x.device), programs),)]
    tensors = (
        TensorDescriptor.from_tensor(out, [tiles.rows, tiles.columns]),
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.inner]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.inner]),
        x if bias is None else bias,
    )
    constants = {
        "BIAS": bias is not None, "BLOCK_INTS": BLOCK_INTS, "TILE_INTS": TILE_INTS, "UNIT": piece_unit(x.itemsize),
        "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.inner, "STAGES": tiles.stages, "TOGETHER": tiles.together,
        "num_warps": tiles.warps,
    }  # fmt: skip
    if delta is None:
        kernel(*tensors, *[x] * 5, rows, size, inner, *[0] * 5, LORA=False, SPLITS=1, **constants)
        return
    meta, group = delta.meta, delta.group
    require(rows <= meta.bounds.tokens and group.features == (size, size), "the delta is of another shape")
    require(meta.bounds.large, "the step is too small to have lists for the tiles")
    kernel(
        *tensors,
        delta.arena,
        meta.z,
        meta.blocks,
        meta.tiles,
        meta.expand_desc,
        rows,
        size,
        inner,
        delta.layer * LORA_MODULES + group.first,
        meta.expand_desc.stride(0),
        meta.bounds.rank_blocks,
        meta.bounds.tokens * 2 * meta.max_rank,
        meta.max_rank,
        LORA=True,
        SPLITS=shrink_tiles(meta.bounds, group, x.element_size()).splits,
        **constants,
    )

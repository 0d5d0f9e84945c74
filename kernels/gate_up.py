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
from kernels.lora_meta import LORA_MODULES, RUN_INTS, TILE_INTS, LoraGroup, LoraMeta


@triton.jit
def _block(lora, run, module: tl.constexpr, block, row, column, size, UNIT, SPLITS, BM: tl.constexpr, BN: tl.constexpr):
    """What a rank block of a run adds to a tile: z's part [BM, 16], zero in others' rows, B's [BN, 16]; the rank."""
    arena, z, z_split, max_rank, desc, desc_stride, blocks = lora
    begin, end, item = run
    i = row + tl.arange(0, BM)
    o = column + tl.arange(0, BN)
    r = tl.arange(0, 16)
    entry = desc + item.to(tl.int64) * desc_stride + module * (1 + blocks)
    rank = tl.load(entry)
    offset = tl.load(entry + 1 + block).to(tl.int64)
    width = tl.multiple_of(tl.minimum(tl.maximum(rank - block * 16, 0), 16), 8)
    b = arena + offset * UNIT + o[:, None] * width + r[None, :]
    bb = tl.load(b, mask=(o < size)[:, None] & (r < width)[None, :], other=0.0)
    own = ((i >= begin) & (i < end))[:, None] & (r < width)[None, :]
    zz = z + i.to(tl.int64)[:, None] * (2 * max_rank) + module * max_rank + block * 16 + r[None, :]
    part = tl.zeros([BM, 16], tl.float32)
    for split in tl.static_range(SPLITS):
        part += tl.load(zz + split * z_split, mask=own, other=0.0)
    return part.to(bb.dtype), bb, rank


@triton.jit
def _add_blocks(acc, lora, runs, first, past, module: tl.constexpr, row, column, size, RUN_INTS, UNIT, SPLITS, BM, BN):
    """acc + z @ B.T, run after run, but for the first rank block of the first run."""
    _arena, _z, _z_split, _max_rank, desc, desc_stride, blocks = lora
    for index in range(first, past):
        head = runs + index * RUN_INTS
        begin = tl.load(head)
        run = begin, begin + tl.load(head + 1), tl.load(head + 2)
        rank = tl.load(desc + run[2].to(tl.int64) * desc_stride + module * (1 + blocks))
        for block in range((index == first).to(tl.int32), tl.cdiv(rank, 16)):
            part, bb, _ = _block(lora, run, module, block, row, column, size, UNIT, SPLITS, BM, BN)
            acc = tl.dot(part, tl.trans(bb), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["rows", "module"])
def _gate_up_silu(
    out,
    x,
    weight,
    bias,
    arena,
    z,
    runs,
    tiles,
    desc,
    rows,
    size,
    inner,
    module,
    desc_stride,
    blocks,
    z_split,
    max_rank,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    RUN_INTS: tl.constexpr,
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
        row = (band + tile % (TOGETHER * across) % high) * BM
        column = tile % (TOGETHER * across) // high * BN
        if LORA:  # what most tiles have to add is read ahead of the sums: it is there when they are
            lora = (arena, z, z_split, max_rank, desc + module * (1 + blocks), desc_stride, blocks)
            head = tiles + row // BM * TILE_INTS
            first = tl.load(head)
            past = tl.load(head + 1)
            run = tl.load(head + 2), tl.load(head + 3), tl.load(head + 4)
            gate_part, gate_b, gate_rank = _block(lora, run, 0, 0, row, column, size, UNIT, SPLITS, BM, BN)
            up_part, up_b, up_rank = _block(lora, run, 1, 0, row, column, size, UNIT, SPLITS, BM, BN)
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, inner, BK, num_stages=STAGES):
            xx = x.load([row, k])
            gate = tl.dot(xx, weight.load([column, k]).T, gate, input_precision="ieee")
            up = tl.dot(xx, weight.load([size + column, k]).T, up, input_precision="ieee")
        if LORA:
            gate = tl.dot(gate_part, tl.trans(gate_b), gate, input_precision="ieee")
            up = tl.dot(up_part, tl.trans(up_b), up, input_precision="ieee")
            if (past > first + 1) | (gate_rank > 16) | (up_rank > 16):
                gate = _add_blocks(
                    gate, lora, runs, first, past, 0, row, column, size, RUN_INTS, UNIT, SPLITS, BM, BN
                )  # fmt: skip
                up = _add_blocks(up, lora, runs, first, past, 1, row, column, size, RUN_INTS, UNIT, SPLITS, BM, BN)
        if BIAS:
            i = column + tl.arange(0, BN)
            gate += tl.load(bias + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + size + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
        fall = tl.exp(-tl.abs(gate))  # never overflows
        value = gate * up * tl.where(gate >= 0, 1.0, fall) / (1.0 + fall)
        out.store([row, column], value.to(out.dtype))


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
    [tokens, size]; all of one dtype, rows of multiples of 16 bytes. The device has TMA (compute capability 9).

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
        "BIAS": bias is not None, "RUN_INTS": RUN_INTS, "TILE_INTS": TILE_INTS, "UNIT": piece_unit(x.element_size()),
        "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.inner, "STAGES": tiles.stages, "TOGETHER": tiles.together,
        "num_warps": tiles.warps,
    }  # fmt: skip
    if delta is None:
        kernel(*tensors, *[x] * 5, rows, size, inner, *[0] * 5, LORA=False, SPLITS=1, **constants)
        return
    meta, group = delta.meta, delta.group
    require(rows <= meta.bounds.tokens and group.features == (size, size), "the delta is of another shape")
    kernel(
        *tensors,
        delta.arena,
        meta.z,
        meta.runs,
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

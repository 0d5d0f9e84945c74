"""Expand: what shrink left, times every row's own adapter's B, into a delta or added to the base product."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fetch import fetch
from kernels.launch import cdiv, dependent, expand_tiles, kept, multiprocessors, require, require_rows, shrink_tiles
from kernels.layout import piece_unit
from kernels.lora_meta import ITEM_INTS, LORA_ITEMS, LORA_MODULES, LoraGroup, LoraMeta


@triton.jit
def _unit(
    index,
    mask,
    items,
    desc,
    first,
    desc_stride,
    blocks,
    out0,
    out1,
    tiles0,
    tiles1,
    tiles,
    ITEM_INTS: tl.constexpr,
    BN: tl.constexpr,
):
    """What a unit's program needs: module, first column in it and in y, descriptor, rank, first piece, row, rows."""
    item = index // tiles
    tile = index % tiles
    module = (tile >= tiles0).to(tl.int32) + (tile >= tiles1).to(tl.int32)
    column = (tile - tl.where(module == 0, 0, tl.where(module == 1, tiles0, tiles1))) * BN
    base = tl.where(module == 0, 0, tl.where(module == 1, out0, out0 + out1)) + column
    entry = desc + tl.cast(item, tl.int64) * desc_stride + (first + module) * (1 + blocks)
    head = items + item * ITEM_INTS
    return (
        module,
        column,
        base,
        entry,
        tl.load(entry, mask=mask, other=0),
        tl.load(entry + 1, mask=mask, other=0),
        tl.load(head, mask=mask, other=0).to(tl.int64),
        tl.load(head + 1, mask=mask, other=0),
    )


@triton.jit
def _sum(zz, i, rows, SPLITS: tl.constexpr):
    """One rank block of z for a unit's rows, float32: the sum of what the parts of the inner dimension gave."""
    total = tl.zeros(zz.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(zz + split * 16, mask=(i < rows)[:, None], other=0.0)
    return total


@triton.jit(do_not_specialize=["first"])
def _expand(
    y,
    arena,
    z,
    counts,
    rows_of,
    items,
    desc,
    first,
    y_stride,
    desc_stride,
    blocks,
    max_rank,
    out0,
    out1,
    out2,
    modules: tl.constexpr,
    UNIT: tl.constexpr,
    ITEMS: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    FURTHER: tl.constexpr,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One unit: BM rows of one item, BN output columns of one module, every rank. B comes first, as A in shrink.

    A unit is read before the list's length is known (the list is never shorter than the grid).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # the op that adds the delta
    i = tl.arange(0, BM)
    o = tl.arange(0, BN)
    r = tl.arange(0, 16)
    tiles0 = tl.cdiv(out0, BN)
    tiles1 = tiles0 + tl.cdiv(out1, BN)
    tiles = tiles1 + tl.cdiv(out2, BN)
    start = tl.program_id(0)
    module, column, base, entry, rank, offset, row, rows = _unit(
        start, start >= 0, items, desc, first, desc_stride, blocks, out0, out1, tiles0, tiles1, tiles, ITEM_INTS, BN
    )
    total = tl.where(tl.load(rows_of) > 0, tl.load(counts + ITEMS) * tiles, 0)
    if PDL:  # the first rank block of B is on its way while shrink ends
        most = tl.where(module == 0, out0, tl.where(module == 1, out1, out2)) - column
        width = tl.where(start < total, tl.minimum(rank, 16), 0)
        piece = arena + offset.to(tl.int64) * UNIT + column * width
        fetch(piece, 1, tl.minimum(most, BN) * width * SIZE, 0, 32)
        if (start < total) | (start == 0):  # as in shrink
            tl.extra.cuda.gdc_wait()
    for index in range(start, total, tl.num_programs(0)):
        size = tl.where(module == 0, out0, tl.where(module == 1, out1, out2)) - column
        row_mask = (i < rows)[:, None]
        zz = z + (row * modules + module) * (max_rank * SPLITS)
        zz += i[:, None] * (modules * max_rank * SPLITS) + r[None, :]
        acc = tl.zeros([BN, BM], tl.float32)
        part = _sum(zz, i, tl.where(rank > 0, rows, 0), SPLITS)
        for block in range(tl.cdiv(rank, 16)):
            width = tl.multiple_of(tl.minimum(rank - block * 16, 16), 8)
            b = arena + (offset.to(tl.int64) * UNIT + column * width) + (o[:, None] * width + r[None, :])
            bb = tl.load(b, mask=(o < size)[:, None] & (r < width)[None, :], other=0.0)
            offset = tl.load(entry + 2 + block, mask=block + 1 < blocks, other=0)
            following = part
            if FURTHER:  # the next block of z is on its way while this one is multiplied
                zz += 16 * SPLITS
                following = _sum(zz, i, tl.where((block + 1) * 16 < rank, rows, 0), SPLITS)
            acc = tl.dot(bb, tl.trans(part.to(bb.dtype)), acc, input_precision="ieee")
            part = following
        delta = tl.trans(acc)
        out = y + (row * y_stride + base) + (i[:, None] * y_stride + o[None, :])
        mask = row_mask & (o < size)[None, :]
        if ADD:
            if rank > 0:
                delta += tl.load(out, mask=mask, other=0.0).to(tl.float32)
                tl.store(out, delta.to(y.dtype.element_ty), mask=mask)
        else:
            tl.store(out, delta.to(y.dtype.element_ty), mask=mask, eviction_policy=KEEP)
        after = index + tl.num_programs(0)
        module, column, base, entry, rank, offset, row, rows = _unit(
            after, after < total, items, desc, first, desc_stride, blocks, out0, out1, tiles0, tiles1, tiles,
            ITEM_INTS, BN,
        )  # fmt: skip


def lora_expand(
    y: Tensor,
    arena: Tensor,
    meta: LoraMeta,
    layer: int,
    group: LoraGroup,
    *,
    add: bool,
    pdl: bool = False,
    keep: bool = False,
) -> None:
    """Finish the product that lora_shrink of the same group began in meta.z. pdl: as it was launched just before.

    y: [tokens, sum(features)], rows contiguous, in the arena's dtype or float32: what is added onto (add) or a delta
    buffer, whose rows of adapters are all written (zeros for a module without an adapter) and whose rows of the base
    are not, nor any where no adapter has the group: the op that adds a delta reads meta.rows(group) of its rows.

    Semantics: y[t, first[m] + o] (+)= sum_r z[t, m, r] * B[s, layer, m][o, r] for row t in an item of slot s.
    """
    require_rows(y)
    require(y.dtype in (arena.dtype, torch.float32), "y and the arena differ in dtype")
    features, itemsize = group.features, arena.element_size()
    require(y.shape[1] == sum(features) and len(features) <= 3, "y's columns are not the group's out features")
    out = (*features, 0, 0)[:3]
    tiles = expand_tiles(meta.bounds, y.element_size())
    programs = meta.bounds.items * sum(cdiv(size, tiles.columns) for size in features)
    _expand[(min(programs, tiles.each * multiprocessors(y.device)),)](
        y,
        arena,
        meta.z,
        meta.counts,
        meta.rows(group),
        meta.items,
        meta.expand_desc,
        layer * LORA_MODULES + group.first,
        y.stride(0),
        meta.expand_desc.stride(0),
        meta.bounds.rank_blocks,
        meta.max_rank,
        *out,
        modules=len(features),
        UNIT=piece_unit(itemsize),
        ITEMS=LORA_ITEMS,
        ITEM_INTS=ITEM_INTS,
        BM=meta.bounds.tile,
        BN=tiles.columns,
        SPLITS=shrink_tiles(meta.bounds, group, itemsize).splits,
        FURTHER=meta.bounds.rank_blocks > 1,
        ADD=add,
        SIZE=itemsize,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **dependent(pdl),
    )

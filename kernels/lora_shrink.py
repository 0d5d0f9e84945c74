"""Shrink: every row's product with its own adapter's A, for one module or several that read the same input."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.columns import load_columns
from kernels.fetch import fetch_at
from kernels.launch import cdiv, dependent, kept, multiprocessors, power_of_two, require, require_rows, shrink_tiles
from kernels.layout import piece_unit
from kernels.lora_meta import LORA_MODULES, LORA_WORK, WORK_INTS, LoraGroup, LoraMeta

PROGRAMS_EACH = 8  # programs a multiprocessor; units of work beyond that are taken in turns


@triton.jit
def _unit(
    index,
    mask,
    work,
    desc,
    first,
    desc_stride,
    count,
    modules: tl.constexpr,
    WORK_INTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What a unit's program needs: its modules (by column), their pieces and ranks, first row, rows, rank block.

    BLOCKS: that many rank blocks of an item are one program's, that of the first of them; the others' have no ranks.
    Units are taken BLOCKS apart, so that programs with work follow each other. count: units there are.
    """
    unit = index // (GROUPS * SPLITS)
    column = tl.arange(0, 16 * WIDTH * BLOCKS) // 16
    module = (index // SPLITS) % GROUPS * WIDTH + column % WIDTH
    real = module < tl.where(mask, modules, 0)
    own = unit
    if BLOCKS > 1:
        lines, further = tl.maximum(tl.cdiv(count, BLOCKS), 1), column // WIDTH
        unit = unit % lines * BLOCKS + unit // lines
        own = unit + further
        listed = tl.where(mask, count, 0)
        mask = unit < listed
        begin = tl.load(work + unit * WORK_INTS + 3, mask=mask, other=1)
        block = tl.load(work + own * WORK_INTS + 3, mask=own < listed, other=-1)
        wanted = tl.where(begin % BLOCKS == 0, begin + further, -2)  # another item's blocks have lower numbers
        real = real & (block == wanted)
    entry = desc + tl.cast(own, tl.int64) * desc_stride + (first + module) * 2
    head = work + unit * WORK_INTS
    return (
        module,
        tl.load(entry, mask=real, other=0).to(tl.int64),
        tl.load(entry + 1, mask=real, other=0),
        tl.load(head, mask=mask, other=0).to(tl.int64),
        tl.load(head + 1, mask=mask, other=0),
        tl.load(head + 3, mask=mask, other=0),
    )


@triton.jit
def _part(split, inner, BK: tl.constexpr, SPLITS: tl.constexpr):
    """(first, one past the last) inner feature of a split: whole tiles side by side, nearly as many in each."""
    tiles = tl.cdiv(inner, BK)
    return split * tiles // SPLITS * BK, tl.minimum((split + 1) * tiles // SPLITS * BK, inner)


@triton.jit(do_not_specialize=["first"])
def _shrink(
    x,
    arena,
    z,
    counts,
    rows_of,
    work,
    desc,
    first,
    inner,
    x_stride,
    desc_stride,
    max_rank,
    modules: tl.constexpr,
    UNIT: tl.constexpr,
    WORK: tl.constexpr,
    WORK_INTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One unit: BM rows of one item, BLOCKS rank blocks of WIDTH modules, one part of the inner dimension.

    A comes first in the product: its ranks fill the 16 rows that the matrix units take at least, an item's need not.
    A unit is read before x is there and, of one rank block, before the list's length is known (the list is never
    shorter than the grid).
    """
    i = tl.arange(0, BM)
    RANKS: tl.constexpr = 16 * WIDTH * BLOCKS
    r = tl.arange(0, RANKS) % 16
    k = tl.arange(0, BK)
    start = tl.program_id(0)
    count = tl.load(counts + WORK)
    module, offset, ranks, row, rows, block = _unit(
        start, start >= 0, work, desc, first, desc_stride, count,
        modules, WORK_INTS, GROUPS, WIDTH, BLOCKS, SPLITS,
    )  # fmt: skip
    total = tl.where(tl.load(rows_of) > 0, tl.cdiv(count, BLOCKS) * (BLOCKS * GROUPS * SPLITS), 0)
    if PDL:  # A is on its way while what makes x ends
        if inner % (16 // SIZE) == 0:
            begin, end = _part(start % SPLITS, inner, BK, SPLITS)
            piece = (arena + (offset * UNIT + r * inner + begin)).to(tl.int64, bitcast=True)
            real = r < tl.where(start < total, ranks, 0)
            fetch_at(piece, tl.where(real, (end - begin) * SIZE, 0), RANKS)
        if (start < total) | (start == 0):  # the others leave their place at once; one makes the launch wait
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not sooner: expand would take the place of the product beside
    for index in range(start, total, tl.num_programs(0)):
        split = index % SPLITS
        if tl.max(ranks, 0) > 0:
            x_rows = x + row * x_stride + i[:, None] * x_stride
            a_rows = arena + (offset * UNIT + r * inner)[:, None]
            row_mask = (i < rows)[:, None]
            rank_mask = (r < ranks)[:, None]
            acc = tl.zeros([RANKS, BM], tl.float32)
            begin, end = _part(split, inner, BK, SPLITS)
            for at in range(begin, end, BK):
                column = (at + k)[None, :]
                xx = load_columns(x_rows, column, row_mask, inner, EVEN)
                aa = load_columns(a_rows, column, rank_mask, inner, EVEN)
                acc = tl.dot(aa, tl.trans(xx), acc, input_precision="ieee")
            of_block = tl.arange(0, RANKS) // (16 * WIDTH) * (16 * SPLITS)
            out = z + (row * modules * max_rank + block * 16) * SPLITS + split * 16
            out += i[:, None] * (modules * max_rank * SPLITS) + (module * max_rank * SPLITS + of_block + r)[None, :]
            tl.store(out, tl.trans(acc), mask=row_mask & (ranks > 0)[None, :], eviction_policy=KEEP)
        after = index + tl.num_programs(0)
        module, offset, ranks, row, rows, block = _unit(
            after, after < total, work, desc, first, desc_stride, count,
            modules, WORK_INTS, GROUPS, WIDTH, BLOCKS, SPLITS,
        )  # fmt: skip


def lora_shrink(
    x: Tensor, arena: Tensor, meta: LoraMeta, layer: int, group: LoraGroup, *, pdl: bool = False, keep: bool = False
) -> None:
    """Partial products of a group's modules.

    pdl: starts before what makes x has ended, and waits for it; its expand is launched next, and may start meanwhile.

    x: [tokens, in], rows contiguous; arena: [num_chunks, chunk_elements] in x's dtype. Writes meta.z, which lora_expand
    of the same group reads; the next shrink overwrites it.

    Semantics: with row t in an item of slot s, sum_split z[t, m, r // 16, split, r % 16] = sum_k x[t, k] * A[s, layer,
    m][r, k] for r below the rank rounded up to 16; rows of the base and modules without an adapter are not written.
    """
    require_rows(x)
    require(x.dtype == arena.dtype, "x and the arena differ in dtype")
    require(x.shape[1] == group.inner, "x's columns are not the group's in features")
    require(x.shape[0] <= meta.bounds.tokens, "more rows than the bucket has")
    tiles, modules = shrink_tiles(meta.bounds, group, x.element_size()), len(group.features)
    width = power_of_two(modules) if tiles.merged else 1
    groups = cdiv(modules, width)
    programs = meta.bounds.items * groups * tiles.splits
    _shrink[(min(programs, PROGRAMS_EACH * multiprocessors(x.device)),)](
        x,
        arena,
        meta.z,
        meta.counts,
        meta.rows(group),
        meta.work,
        meta.shrink_desc,
        layer * LORA_MODULES + group.first,
        x.shape[1],
        x.stride(0),
        meta.shrink_desc.stride(0),
        meta.max_rank,
        modules,
        UNIT=piece_unit(arena.element_size()),
        WORK=LORA_WORK,
        WORK_INTS=WORK_INTS,
        GROUPS=groups,
        WIDTH=width,
        BLOCKS=tiles.blocks,
        BM=meta.bounds.tile,
        BK=tiles.inner,
        SPLITS=tiles.splits,
        SIZE=x.element_size(),
        EVEN=group.inner % tiles.inner == 0,
        KEEP=kept(keep),
        PDL=pdl,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **dependent(pdl),
    )

"""Flat descriptors for shrink and expand, made once a step: what each program needs, without chains of loads.

The worker launches it first in a step (and in a captured graph); shrink and expand of every layer read its output.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, require
from kernels.lora_meta import LORA_WORK, WORK_INTS, LoraMeta


@triton.jit
def _gather(
    counts,
    work,
    pieces,
    ranks,
    shrink_desc,
    expand_desc,
    modules,
    blocks,
    WORK: tl.constexpr,
    WORK_INTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0)
    if unit < tl.load(counts + WORK):
        slot = tl.load(work + unit * WORK_INTS + 2).to(tl.int64)
        block = tl.load(work + unit * WORK_INTS + 3)
        item = tl.load(work + unit * WORK_INTS + 4).to(tl.int64)
        m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        real = m < modules
        rank = tl.load(ranks + slot * modules + m, mask=real, other=0)
        here = tl.minimum(tl.maximum(rank - block * 16, 0), 16)
        piece = pieces + ((slot * modules + m) * 2) * blocks + block
        a = tl.load(piece, mask=real & (here > 0), other=-1)
        b = tl.load(piece + blocks, mask=real & (here > 0), other=-1)
        a_out = shrink_desc + (tl.cast(unit, tl.int64) * modules + m) * 2
        tl.store(a_out, a, mask=real)
        tl.store(a_out + 1, here, mask=real)
        b_out = expand_desc + (item * modules + m) * (1 + blocks)
        tl.store(b_out, rank, mask=m < tl.where(block == 0, modules, 0))
        tl.store(b_out + 1 + block, b, mask=real)


def lora_gather(meta: LoraMeta, pieces: Tensor, ranks: Tensor) -> None:
    """Fill the descriptors of the step's work from the device tables.

    pieces: [slots, layers, 7, 2, max_rank_blocks] int32; ranks: [slots, layers, 7] int32.

    Semantics, for each unit of work u of slot s, rank block b and item i, and each layer and module lm:
    shrink_desc[u, lm] = (pieces[s, lm, 0, b], min(16, ranks[s, lm] - 16 b) or 0);
    expand_desc[i, lm, 0] = ranks[s, lm]; expand_desc[i, lm, 1 + b] = pieces[s, lm, 1, b].
    """
    require(pieces.is_contiguous() and ranks.is_contiguous(), "the tables must be contiguous")
    require(pieces.shape[-1] == meta.bounds.rank_blocks, "the piece table and the bucket differ in rank blocks")
    modules, block = meta.shrink_desc.shape[1], 256
    _gather[(meta.bounds.work, cdiv(modules, block))](
        meta.counts,
        meta.work,
        pieces,
        ranks,
        meta.shrink_desc,
        meta.expand_desc,
        modules,
        meta.bounds.rank_blocks,
        WORK=LORA_WORK,
        WORK_INTS=WORK_INTS,
        BLOCK=block,
    )

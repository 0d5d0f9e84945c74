"""The first kernels of a step: block tables brought up to date, embeddings looked up; and rows picked for the head."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, require, require_rows
from kernels.step_meta import ROW, SAMPLE_INTS, SAMPLES, TABLE_UPDATES, UPDATE_INTS

BLOCK = 1024
UPDATE_BLOCK, UPDATE_PROGRAMS = 128, 4


@triton.jit
def _update(table, step, tail, COUNT: tl.constexpr, INTS: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.load(step + COUNT)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.load(tail + i * INTS, mask=i < count, other=0)
        value = tl.load(tail + i * INTS + 1, mask=i < count, other=0)
        tl.store(table + at, value, mask=i < count)


def update_tables(tables: Tensor, step: Tensor, tail: Tensor) -> None:
    """tables: [rows, max_blocks] int32, contiguous; tail: [any] int32, pairs of a flat place and a value.

    Semantics: tables.view(-1)[tail[2 u]] = tail[2 u + 1] for u below step[TABLE_UPDATES]; places are distinct.
    """
    require(tables.is_contiguous() and tables.numel() < 2**31, "the tables must be contiguous and below 2^31 entries")
    _update[(UPDATE_PROGRAMS,)](tables, step, tail, COUNT=TABLE_UPDATES, INTS=UPDATE_INTS, BLOCK=UPDATE_BLOCK)


@triton.jit
def _embed(out, weight, ids, last_token, size, out_stride, weight_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    known = token >= 0
    last = tl.load(last_token + tl.where(known, 0, -1 - token), mask=token < 0, other=0)
    token = tl.where(known, token, last)
    value = tl.load(weight + token * weight_stride + i, mask=i < size, other=0.0)
    tl.store(out + row * out_stride + i, value, mask=i < size)


def embed(out: Tensor, weight: Tensor, ids: Tensor, last_token: Tensor) -> None:
    """out: [tokens, hidden], of any dtype; weight: [vocab, hidden]; ids: [tokens] int32; last_token: [rows] int64.

    Semantics: out[t] = weight[ids[t]] where ids[t] >= 0, else weight[last_token[-1 - ids[t]]].
    """
    require_rows(out, weight)
    size = out.shape[1]
    _embed[(out.shape[0], cdiv(size, BLOCK))](
        out, weight, ids, last_token, size, out.stride(0), weight.stride(0), BLOCK=BLOCK
    )


@triton.jit
def _pick(
    out, x, step, samples, size, out_stride, x_stride,
    SAMPLES: tl.constexpr, INTS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    if sample < tl.load(step + SAMPLES):
        row = tl.load(samples + sample * INTS + ROW).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + i, mask=i < size, other=0.0)
        tl.store(out + tl.cast(sample, tl.int64) * out_stride + i, value, mask=i < size)


def pick_rows(out: Tensor, x: Tensor, step: Tensor, samples: Tensor) -> None:
    """out: [samples, size]; x: [tokens, size]; samples: [samples, SAMPLE_INTS] int32.

    Semantics: out[s] = x[samples[s, ROW]] for s below step[SAMPLES]; the other rows are left.
    """
    require_rows(out, x)
    size = out.shape[1]
    _pick[(out.shape[0], cdiv(size, BLOCK))](
        out, x, step, samples, size, out.stride(0), x.stride(0),
        SAMPLES=SAMPLES, INTS=SAMPLE_INTS, ROW=ROW, BLOCK=BLOCK,
    )  # fmt: skip

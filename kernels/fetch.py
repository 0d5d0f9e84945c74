"""Weights on their way into the second-level cache before a kernel may read its input: it starts at the cache's speed.

Fetching changes no result.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def fetch_at(address, size, LANES: tl.constexpr):
    """A piece a thread: LANES int64 addresses and int32 bytes, both multiples of 16; 0 bytes: none.

    The first threads have them all; those behind hold copies, and would fetch the same again.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred real;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.ne.u32 real, $2, 0;
        setp.lt.and.u32 real, thread, $3, real;
        @real cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [address, size, LANES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def fetch(weight, count, width, stride, LANES: tl.constexpr):
    """So many pieces, one a thread. The widths are multiples of 16; nothing waits for what is fetched."""
    piece = tl.arange(0, LANES)
    address = weight.to(tl.int64, bitcast=True) + piece.to(tl.int64) * stride
    fetch_at(address, tl.where(piece < count, width, 0), LANES)

"""Tiles of rows along their inner dimension, zeros beyond it."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def load_columns(rows, column, mask, inner, EVEN: tl.constexpr):
    """[rows, columns] from `rows` [rows, 1] of pointers, where mask [rows, 1] is; EVEN: every column [1, columns] is
    below inner, which is then not asked for each.
    """
    if not EVEN:
        mask = mask & (column < inner)
    return tl.load(rows + column, mask=mask, other=0.0)

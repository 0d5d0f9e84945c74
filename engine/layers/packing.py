"""Weights in the blocked layout that oneDNN multiplies with, for `PackedProduct`.

oneDNN takes ten times as long to choose a layout as to write a small weight in it, and chooses anew for every weight.
A `Packer` asks once for each shape, and only where it has seen its own writing give oneDNN's very bytes writes itself.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PACK_ROWS = 16  # rows of input that the packed layout is chosen for; it serves every number of rows
BLOCKS = (64, 48, 32, 16)  # outputs of one block; within it, a word of 4 bytes of each output follows the other
MAX_SHAPES = 64  # kept at a time; each takes the memory of one packed weight

Words = NDArray[np.int32]


def reorder(weight: Tensor) -> Tensor:
    """The weight, [out, in] float32 or bfloat16, in the layout that oneDNN chooses; opaque."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), PACK_ROWS)
    return packed


@dataclass(frozen=True, slots=True)
class Form:
    """How weights of one shape are packed."""

    empty: Tensor  # packed zeros, padding included
    outputs: int  # of one block

    def write(self, weight: Tensor) -> Tensor:
        """A packed copy of the weight."""
        packed, size = self.empty.clone(), self.outputs
        rows = weight.contiguous().view(torch.int32).numpy()  # [out, words]
        blocks = _words(packed).reshape(-(-len(rows) // size), -1, size)
        whole, width = len(rows) // size, rows.shape[1]
        blocks[:whole, :width] = rows[: whole * size].reshape(whole, size, width).transpose(0, 2, 1)
        if rest := len(rows) % size:
            blocks[whole, :width, :rest] = rows[whole * size :].T
        return packed


class Packer:
    """`pack` gives what `reorder` gives, sooner from a shape's second weight on. Threads may share it."""

    def __init__(self) -> None:
        self._forms: dict[tuple[torch.Size, torch.dtype], Form | None] = {}  # None: only `reorder` can

    def pack(self, weight: Tensor) -> Tensor:
        key = weight.shape, weight.dtype
        if key not in self._forms:
            if len(self._forms) >= MAX_SHAPES:
                self._forms.clear()
            self._forms[key] = _learn(weight)
        form = self._forms.get(key)
        return reorder(weight) if form is None else form.write(weight)


def _learn(weight: Tensor) -> Form | None:
    """The form of this shape and dtype in which weights lie as oneDNN would lay them."""
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("data_ptr", "_nbytes"))
    if not known or weight.shape[1] * weight.itemsize % 4:
        return None
    probe, empty = _distinct(weight), reorder(torch.zeros_like(weight))
    wanted = reorder(probe)
    total, width = torch.ops.mkldnn._nbytes(wanted) // 4, probe.nbytes // 4 // len(probe)
    for outputs in BLOCKS:
        padded = -(-len(probe) // outputs) * outputs
        if total % padded == 0 and total >= padded * width:
            form = Form(empty, outputs)
            written = form.write(probe)
            if np.array_equal(_words(written), _words(wanted)):
                return form
    return None


def _distinct(like: Tensor) -> Tensor:
    """A weight of finite numbers, of which no two words of 4 bytes are equal."""
    index = torch.arange(like.nbytes // 4, dtype=torch.int64)
    words = (0x2000 + (index >> 12) << 16) | (0x2000 + (index & 0xFFF))
    return words.to(torch.int32).view(like.dtype).view(like.shape)


def _words(packed: Tensor) -> Words:
    """A packed weight's own memory; valid for as long as the weight is."""
    ops: Any = torch.ops.mkldnn
    memory = (ctypes.c_int32 * (ops._nbytes(packed) // 4)).from_address(ops.data_ptr(packed))
    return np.frombuffer(memory, np.int32)

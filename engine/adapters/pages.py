"""Large memory for adapters' bytes, in huge pages where the system has them.

Memory in pages of 4 KiB costs up to half a millisecond a MiB when it is first touched, and malloc gives large buffers
back each time, so that each load would pay anew.
"""

import contextlib
import mmap
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 3  # memories that wait for the next file: of one for each thread that reads, and one between two threads
KEPT_BYTES = 64 << 20  # the largest that is kept
SMALL_PAGE = 4 << 10  # bytes
HEAP_PART = 1 << 20  # bytes that are touched at once: no more than one huge page, which takes up to 5 ms
LARGEST_IN_HEAP = 31 << 20  # bytes: what is larger malloc takes from the system


def fresh_pages(size: int) -> Tensor:
    """[size] uint8, zeros; given back to the system when nothing refers to it. Raises MemoryError."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes of host memory are not to be had: {error.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def touch_heap(size: int, turn: Callable[[], None]) -> None:
    """Touches so much of malloc's free memory, where what is allocated next will lie; calls `turn` between parts.

    Otherwise a step would: its tensors lie behind all that is kept. A part is given back at once, so that a step
    between two of them finds its own memory where it was.
    """
    for end in range(HEAP_PART, size + HEAP_PART, HEAP_PART):
        torch.empty(min(end, LARGEST_IN_HEAP), dtype=torch.uint8)[::SMALL_PAGE].zero_()
        turn()


class ReusedPages:
    """Memory that is lent again once nothing refers to it, touched already. Threads may share it."""

    def __init__(self) -> None:
        self._free = deque[Tensor](maxlen=KEPT)

    def take(self, size: int) -> NDArray[np.uint8]:
        """[size] uint8 of any content. Raises MemoryError."""
        memory = self._kept(size)
        whole: NDArray[np.uint8] = memory.numpy()
        if len(whole) <= KEPT_BYTES:  # every view of it refers to it
            weakref.finalize(whole, self._free.append, memory).atexit = False
        return whole[:size]

    def _kept(self, size: int) -> Tensor:
        with contextlib.suppress(IndexError):  # none is left
            while len(memory := self._free.popleft()) < size:
                pass
            return memory
        return fresh_pages(size)

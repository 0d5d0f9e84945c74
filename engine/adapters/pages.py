"""Large memory for adapters' bytes, in huge pages where the system has them.

Memory in pages of 4 KiB costs up to half a millisecond a MiB when it is first touched, and malloc gives large buffers
back each time, so that each load would pay anew.
"""

import contextlib
import mmap

import torch
from torch import Tensor


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

"""Streams, events and host memory of the device that a worker drives: a GPU, or the CPU behind Triton's interpreter.

All that a step does is in the order of one stream; `beside` opens a second one next to it, joined before what follows.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.worker.edges import CaptureEdges


class Event(Protocol):
    """A point in the device's work."""

    def record(self) -> None: ...

    def query(self) -> bool:
        """Whether what was recorded last has happened."""
        ...

    def synchronize(self) -> None: ...


class Accelerator(Protocol):
    """What the worker's device parts need of the device."""

    @property
    def device(self) -> torch.device: ...

    def launching(self) -> AbstractContextManager[object]:
        """The steps' stream, for the calling thread."""
        ...

    def copying(self) -> AbstractContextManager[object]:
        """The stream of adapter loads."""
        ...

    def beside(self, *, early: bool = False, first: bool = True) -> AbstractContextManager[object]:
        """Work that starts where the steps' stream stands and runs next to it until `join`.

        early: its first kernel and the one ahead are dependent launches: in a graph it starts before that one has ended
        and waits by itself. first: multiprocessors go to it before the steps' stream; otherwise behind that.
        """
        ...

    def join(self) -> None:
        """The steps' stream goes on when what ran beside it is done."""
        ...

    def event(self) -> Event: ...

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that copies run from and to without being waited for."""
        ...

    def synchronize(self) -> None: ...

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        """A copy on the device; the caller may change the array at once."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the host, complete when an event recorded after the call has happened."""
        ...


class CudaAccelerator:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._above = torch.cuda.Stream(device, priority=-2)  # type: ignore[no-untyped-call]
        self._below = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._beside = self._above  # the one of the two that runs next to the steps' stream
        self._edges = CaptureEdges()

    def launching(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._steps)

    def copying(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)

    @contextlib.contextmanager
    def beside(self, *, early: bool = False, first: bool = True) -> Iterator[None]:
        """In an eager step too: the branch costs two events, which a graph does without."""
        self._beside = self._above if first else self._below
        self._beside.wait_stream(self._steps)
        if early:
            self._edges.relax(self._steps.cuda_stream, self._beside.cuda_stream)
        with torch.cuda.stream(self._beside):
            yield

    def join(self) -> None:
        self._steps.wait_stream(self._beside)

    def event(self) -> Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class _Done:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class InterpretedAccelerator:
    """The CPU, where Triton's interpreter runs each kernel at its launch; for tests without a GPU."""

    device = torch.device("cpu")

    def launching(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    copying = launching

    def beside(self, *, early: bool = False, first: bool = True) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def join(self) -> None:
        pass

    def event(self) -> Event:
        return _Done()

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def synchronize(self) -> None:
        pass

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array.copy())

    def download(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


def make_accelerator(device: torch.device) -> Accelerator:
    return CudaAccelerator(device) if device.type == "cuda" else InterpretedAccelerator()

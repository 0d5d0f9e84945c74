"""Host memory that a step's metadata is packed in, and its one copy to the device. Buffers are used in turns.

A buffer is written again only when its last copy has happened, so packing never waits for the step before.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from engine.worker.accelerator import Accelerator
from engine.worker.shapes import StepShape

Ints = NDArray[np.int32]
BUFFERS = 3


class Staging:
    """`begin`, fill, `send`."""

    def __init__(self, accelerator: Accelerator, size: int) -> None:
        self.device = torch.zeros(size, dtype=torch.int32, device=accelerator.device)
        self._hosts = [accelerator.host(size, dtype=torch.int32) for _ in range(BUFFERS)]
        self._copied = [accelerator.event() for _ in range(BUFFERS)]
        self._views: dict[tuple[int, StepShape], dict[str, Ints]] = {}
        self._current = 0

    def begin(self, shape: StepShape) -> Mapping[str, Ints]:
        """The next buffer's fields under the shape's layout, and `tail`: what follows them."""
        self._current = (self._current + 1) % BUFFERS
        self._copied[self._current].synchronize()
        key = self._current, shape
        if key not in self._views:
            host = self._hosts[self._current]
            fields = {name: view.numpy() for name, view in shape.layout.split(host).items()}
            self._views[key] = {**fields, "tail": host[shape.layout.size :].numpy()}
        return self._views[key]

    def send(self, shape: StepShape, tail: int) -> None:
        """Copies the fields and that many integers of the tail."""
        size = shape.layout.size + tail
        self.device[:size].copy_(self._hosts[self._current][:size], non_blocking=True)
        self._copied[self._current].record()

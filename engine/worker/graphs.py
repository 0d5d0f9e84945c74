"""CUDA graphs of the steps' shapes: captured at start, replayed by shape. A step without one is launched eagerly."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from engine.models.weights import Progress
from engine.worker.accelerator import Accelerator
from engine.worker.shapes import StepShape

Launch = Callable[[StepShape], None]


@dataclass(frozen=True, slots=True)
class StepGraphs:
    forward: torch.cuda.CUDAGraph
    sample: torch.cuda.CUDAGraph


class Graphs:
    """Runs `forward` and `sample` of a shape: its graphs where it has them, else the launches themselves."""

    def __init__(self, accelerator: Accelerator, forward: Launch, sample: Launch) -> None:
        self.replays = 0  # steps whose layers ran as a graph
        self.eager = 0
        self._accelerator = accelerator
        self._forward = forward
        self._sample = sample
        self._graphs: dict[StepShape, StepGraphs] = {}

    def forward(self, shape: StepShape, eager: Callable[[], None] | None = None) -> None:
        """eager: launches the step in another way where the shape has no graph."""
        graphs = self._graphs.get(shape)
        if graphs is None:
            self.eager += 1
            self._forward(shape) if eager is None else eager()
        else:
            self.replays += 1
            graphs.forward.replay()

    def sample(self, shape: StepShape) -> None:
        graphs = self._graphs.get(shape)
        if graphs is None:
            self._sample(shape)
        else:
            graphs.sample.replay()

    def capture(self, shapes: Iterable[StepShape], progress: Progress) -> None:
        """Each shape is launched once first, so that its kernels are compiled; its lists must be empty meanwhile."""
        every = list(shapes)
        pool = torch.cuda.graph_pool_handle()
        with self._accelerator.launching():
            for done, shape in enumerate(every, 1):
                self._forward(shape)
                self._sample(shape)
                self._accelerator.synchronize()
                self._graphs[shape] = StepGraphs(
                    _captured(self._forward, shape, pool), _captured(self._sample, shape, pool)
                )
                progress("graphs", done, len(every))


def _captured(run: Launch, shape: StepShape, pool: Any) -> torch.cuda.CUDAGraph:
    """Captures on the calling thread's stream; other threads may go on using the device."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        run(shape)
    finally:
        graph.capture_end()
    return graph

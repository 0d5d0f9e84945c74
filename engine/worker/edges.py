"""Dependent launches across two streams of a capture, which PyTorch's events cannot express.

A kernel that is launched behind an event starts when all that came before the event has ended. In a graph the edge
between them may be programmatic instead (CUDA driver API, `CUgraphEdgeData`): the kernel starts when those before it
allow it, and waits for them by itself. Used by the accelerator for the branch beside a step.
"""

import ctypes
from typing import Any

CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
REPLACE = 1  # CU_STREAM_SET_CAPTURE_DEPENDENCIES
PROGRAMMATIC_PORT, PROGRAMMATIC_TYPE = 1, 1  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_...


class Edge(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


class CaptureEdges:
    """Edges of a capture; drivers before CUDA 12.3 have none but full ones, and theirs are left alone."""

    def __init__(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._info: Any = getattr(driver, "cuStreamGetCaptureInfo_v3", None)
        self._update: Any = getattr(driver, "cuStreamUpdateCaptureDependencies_v2", None)

    def relax(self, ahead: int, behind: int) -> None:
        """The next launch of stream `behind` depends on the last of stream `ahead`, and on that alone, loosely.

        Both are driver handles and capture one graph; without a capture nothing happens. Raises RuntimeError where the
        driver refuses.
        """
        if self._info is None or self._update is None:
            return
        nodes = self._last(ahead)
        if nodes:
            edges = (Edge * len(nodes))(*(Edge(PROGRAMMATIC_PORT, 0, PROGRAMMATIC_TYPE) for _ in nodes))
            places = (ctypes.c_void_p * len(nodes))(*nodes)
            _check(self._update(ctypes.c_void_p(behind), places, edges, ctypes.c_size_t(len(nodes)), REPLACE))

    def _last(self, stream: int) -> list[int | None]:
        """The nodes that the stream's next launch depends on."""
        status, count = ctypes.c_int(), ctypes.c_size_t()
        nodes, edges = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_void_p()
        found = [ctypes.byref(x) for x in (nodes, edges, count)]
        _check(self._info(ctypes.c_void_p(stream), ctypes.byref(status), None, None, *found))
        return [nodes[i] for i in range(count.value)] if status.value == CAPTURING else []


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"the driver refused an edge of a captured graph: error {result}")

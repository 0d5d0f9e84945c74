"""Times on an accelerator: medians of replays of a captured graph, and the ceilings of the card that runs it.

Without an accelerator the same calls are timed on the CPU, so that a benchmark's short form runs anywhere.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Waits for all that was launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graph_times(step: Callable[[], object], repeats: int = 30) -> list[float]:
    """Milliseconds of each replay of the step's captured graph, after warm-up."""
    if not torch.cuda.is_available():
        return eager_times(step, repeats)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    return [_timed(graph.replay) for _ in range(repeats)]


def eager_times(step: Callable[[], object], repeats: int = 10) -> list[float]:
    """Milliseconds of each call."""
    for _ in range(2):
        step()
    return [_timed(step) for _ in range(repeats)]


def host_times(step: Callable[[], object], repeats: int = 10) -> list[float]:
    """Milliseconds by the host's clock of each call and all that it launched."""
    for _ in range(2):
        step()
    synchronize()
    return [timed_by_host(step) for _ in range(repeats)]


def timed_by_host(call: Callable[[], object]) -> float:
    """Milliseconds by the host's clock of one call and all that it launched."""
    began = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - began) * 1e3


def _timed(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        return timed_by_host(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def read_rate(size: int = 2**32) -> float:
    """Bytes a second that one kernel reads from memory: the sum of `size` bytes."""
    data = torch.randn(size // 4, device=default_device())
    return data.numel() * 4 / (statistics.median(eager_times(lambda: data.sum())) / 1e3)


def copy_rate(size: int = 2**31) -> float:
    """Bytes a second read and written by a copy within the device's memory."""
    source = torch.randn(size // 4, device=default_device())
    target = torch.empty_like(source)
    return 2 * size / (statistics.median(eager_times(lambda: target.copy_(source))) / 1e3)


def matrix_rate(side: int = 8192) -> float:
    """FLOPs a second of a bf16 product of side x side x side on random data."""
    a, b = (torch.randn(side, side, device=default_device(), dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / (statistics.median(eager_times(lambda: torch.mm(a, b, out=out))) / 1e3)


def always(value: object) -> Callable[..., object]:
    """A function of anything that gives this value."""
    return lambda *arguments, **named: value


@contextmanager
def replaced(value: object, *places: tuple[ModuleType, str]) -> Iterator[None]:
    """Another value in the modules' namespaces, for the length of a measurement: how tiles are tried."""
    old = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), before in zip(places, old, strict=True):
            setattr(module, name, before)

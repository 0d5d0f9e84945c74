"""Times on an accelerator: medians of replays of a captured graph, and the ceilings of the card that runs it."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch


def graph_times(step: Callable[[], None], repeats: int = 30) -> list[float]:
    """Milliseconds of each replay of the step's captured graph, after warm-up."""
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


def eager_times(step: Callable[[], None], repeats: int = 10) -> list[float]:
    """Milliseconds of each call."""
    for _ in range(2):
        step()
    return [_timed(step) for _ in range(repeats)]


def _timed(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def read_rate() -> float:
    """Bytes a second that one kernel reads from memory: the sum of 4 GB."""
    data = torch.randn(2**30, device="cuda")
    return data.numel() * 4 / (statistics.median(eager_times(lambda: data.sum())) / 1e3)  # type: ignore[arg-type]


def matrix_rate() -> float:
    """FLOPs a second of a bf16 product of 8192 x 8192 x 8192 on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / (statistics.median(eager_times(lambda: torch.mm(a, b, out=out))) / 1e3)  # type: ignore[arg-type]


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

"""What the present card can do at best: linear layers, reads, copies, host to device, launches.

    python -m benchmarks.floors [--commit HASH] [--folder benchmarks/results] [--tiny]

Every ratio of a benchmark is over the floors of its own run, so whoever measures takes `Floors` there.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.device_timing import (
    copy_rate,
    default_device,
    eager_times,
    graph_times,
    host_times,
    matrix_rate,
    read_rate,
)  # fmt: skip
from benchmarks.report import SHORT, Report
from engine.models.dims import ModelDims

BATCHES = (1, 8, 32, 64, 128, 256, 512)
LLAMA_DIMS = ModelDims(32, 4096, 14336, 32, 8, 128, 128256)
TINY_DIMS = ModelDims(2, 64, 96, 4, 2, 16, 256)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each floor moves."""

    reads: int = 2**32  # bytes
    copies: int = 2**31  # bytes
    matrix: int = 8192  # side
    page: int = 2**21  # bytes of a chunk
    pages: int = 42  # of an adapter of rank 16
    launches: int = 1000


TINY = Sizes(reads=2**16, copies=2**16, matrix=64, page=2**10, pages=2, launches=10)


@dataclass(frozen=True, slots=True)
class Floors:
    """What no step can be faster than: the products alone, and bytes at the card's read rate."""

    products: Mapping[int, float]  # batch -> milliseconds of one step's linear layers and head
    read_rate: float  # bytes a second
    kv_bytes: int  # a token

    def step(self, batch: int, context: int, adapter_bytes: int = 0) -> float:
        """Milliseconds of a decode step; `context` is the mean number of tokens that a sequence reads."""
        return self.products[batch] + (batch * context * self.kv_bytes + adapter_bytes) / self.read_rate * 1e3

    def read(self, size: int) -> float:
        """Milliseconds."""
        return size / self.read_rate * 1e3


def take_floors(
    report: Report, matrices: Sequence[Tensor], batches: Sequence[int], dims: ModelDims, sizes: Sizes
) -> Floors:
    """Measures and reports what a step's floor is made of. `matrices`: all linear weights and the head, [out, in]."""
    products = {}
    for batch in batches:
        products[batch] = report.add(
            f"floor: products and head, batch {batch}", "ms", _products(matrices, batch)
        ).median
    rate = read_rate(sizes.reads)
    report.add("floor: memory reads", "TB/s", [rate / 1e12])
    report.add("floor: matrix rate", "TFLOP/s", [matrix_rate(sizes.matrix) / 1e12])
    return Floors(products, rate, dims.kv_elements_per_token * matrices[0].element_size())


def card_floors(report: Report, sizes: Sizes) -> None:
    """Copies, transfers and launches: what steps do not need and loads do."""
    report.add("floor: copies within memory, read + written", "TB/s", [copy_rate(sizes.copies) / 1e12])
    _transfers(report, sizes)
    _launches(report, sizes)


def random_matrices(dims: ModelDims, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """A model's linear weights as the decoder merges them, and the head."""
    q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    shapes = [(q + 2 * kv, dims.hidden), (dims.hidden, q), (2 * dims.intermediate, dims.hidden)]
    shapes = [*shapes, (dims.hidden, dims.intermediate)] * dims.layers + [(dims.vocab, dims.hidden)]
    return [torch.empty(shape, dtype=dtype, device=default_device()).normal_(0.0, 0.02) for shape in shapes]


def _products(matrices: Sequence[Tensor], batch: int) -> list[float]:
    """Milliseconds of one step's products with nothing between them."""
    like = matrices[0]
    inputs = {k: like.new_empty(batch, k).normal_() for k in {w.shape[1] for w in matrices}}
    outputs = {n: like.new_empty(batch, n) for n in {w.shape[0] for w in matrices}}

    def step() -> None:
        for weight in matrices:
            torch.mm(inputs[weight.shape[1]], weight.t(), out=outputs[weight.shape[0]])

    return graph_times(step, 10)


def _transfers(report: Report, sizes: Sizes) -> None:
    """Pinned host memory to the device: an adapter's bytes in one copy, and chunk by chunk."""
    host = torch.zeros(sizes.pages, sizes.page, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    device = torch.empty_like(host, device=default_device())
    pairs = list(zip(host.unbind(), reversed(device.unbind()), strict=True))

    def scattered() -> None:
        for source, target in pairs:
            target.copy_(source, non_blocking=True)

    one = report.add(
        f"floor: pinned host to device, {host.nbytes / 1e6:.0f} MB at once", "ms",
        host_times(lambda: device.copy_(host, non_blocking=True)),
    )  # fmt: skip
    report.add(f"floor: the same in {sizes.pages} copies", "ms", host_times(scattered))
    report.add("floor: pinned host to device", "GB/s", [host.nbytes / one.median / 1e6])


def _launches(report: Report, sizes: Sizes) -> None:
    """Microseconds of a small kernel inside a graph, and of a launch without one."""
    one = torch.zeros(1, device=default_device())

    def many() -> None:
        for _ in range(sizes.launches):
            one.add_(1.0)

    def each(times: Sequence[float]) -> list[float]:
        return [time * 1e3 / sizes.launches for time in times]

    report.add("floor: a small kernel inside a graph", "us", each(graph_times(many, 10)))
    report.add("floor: a launch outside a graph", "us", each(host_times(many)))
    if torch.cuda.is_available():
        report.add("floor: a Triton launch outside a graph", "us", each(eager_times(_triton_launches(sizes.launches))))


def _triton_launches(count: int) -> Callable[[], None]:
    from kernels.silu_mul import silu_mul

    rows = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(1, 64, device="cuda", dtype=torch.bfloat16)

    def many() -> None:
        for _ in range(count):
            silu_mul(out, rows)

    return many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little memory: shows that it runs")
    arguments = parser.parse_args()
    dims, sizes = (TINY_DIMS, TINY) if arguments.tiny else (LLAMA_DIMS, Sizes())
    report = Report(f"floors{SHORT}" if arguments.tiny else "floors", arguments.commit)
    try:
        floors = take_floors(report, random_matrices(dims), BATCHES, dims, sizes)
        card_floors(report, sizes)
        step = floors.step(32, 592)
        report.add("floor: a decode step of batch 32, context 592", "ms", [step])
    finally:
        report.save(arguments.folder)


if __name__ == "__main__":
    main()

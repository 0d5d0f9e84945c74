"""Tiles of our own products beside the library's: microseconds of each, for the shapes of Llama-3.1-8B.

    python -m benchmarks.product_tiles [--rows 32 64] [--shapes o down] [--commit HASH] [--folder benchmarks/results]

What o and down leave in parts is added up by the norm behind them, whose time is in their figures and the library's.
--tiny: a tiny shape and few tiles; with TRITON_INTERPRET=1 it needs no accelerator.
"""

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.device_timing import always, default_device, graph_times, replaced
from benchmarks.report import SHORT, Report
from kernels import product as module
from kernels.ahead import compiling_ahead, default_threads
from kernels.launch import (
    PRODUCT_MEMORY,
    SHARED_MEMORY,
    ProductTiles,
    cdiv,
    multiprocessors,
    power_of_two,
    product_tiles,
)
from kernels.norm import add_rms_norm
from kernels.product import product

BEYOND_CACHE = 200_000_000  # bytes of weights that one measurement reads, each once
MOST_SUMS = 128  # of a thread, in registers


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    features: int
    inner: int
    summed: bool  # the op behind adds parts up


@dataclass(frozen=True, slots=True)
class Axes:
    """What is tried: every combination that a multiprocessor holds."""

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    parts: tuple[int, ...]  # of the inner dimension, where they are summed
    inner: tuple[int, ...]
    warps: tuple[int, ...]
    tma_rows: int  # above which tiles are loaded whole, too
    repeats: int

    def tiles(self, shape: Shape, rows: int, device: torch.device) -> Iterator[ProductTiles]:
        tile = max(16, power_of_two(rows))
        tma = (False, True) if rows > self.tma_rows else (False,)
        axes = self.columns, self.parts if shape.summed else (1,), self.inner, self.warps, tma
        for columns, parts, inner, warps, whole in itertools.product(*axes):
            programs = max(cdiv(shape.features, columns), multiprocessors(device) // parts)
            line = (columns + tile) * inner * 2
            if columns * tile > MOST_SUMS * warps * 32 or shape.inner % (inner * parts):
                continue
            for stages in {min(6, memory // line) for memory in (PRODUCT_MEMORY, SHARED_MEMORY)}:
                if stages >= 3:
                    yield ProductTiles(programs, parts, columns, tile, inner, warps, stages, tma=whole)


FULL = Axes(
    shapes=(
        Shape("qkv", 6144, 4096, False),
        Shape("o", 4096, 4096, True),
        Shape("gate_up", 28672, 4096, False),
        Shape("down", 4096, 14336, True),
    ),
    rows=(32, 64, 128, 256),
    columns=(64, 128, 256),
    parts=(1, 2, 4, 8),
    inner=(64, 128),
    warps=(4, 8),
    tma_rows=32,
    repeats=15,
)
SMALL = Axes(
    shapes=(Shape("qkv", 96, 64, False), Shape("down", 64, 128, True)),
    rows=(2,),
    columns=(64,),
    parts=(1, 2),
    inner=(64,),
    warps=(4,),
    tma_rows=1,
    repeats=2,
)


class Measured:
    """One shape with so many rows; weights in turn, so that none is in the cache."""

    def __init__(self, shape: Shape, rows: int, weights: Sequence[Tensor]) -> None:
        device = weights[0].device
        self.shape, self.rows, self.weights = shape, rows, weights
        self.x = torch.randn(rows, shape.inner, device=device).to(weights[0].dtype)
        self.out = self.x.new_empty(rows, shape.features)
        self.residual = torch.zeros(rows, shape.features, device=device)
        self.norm = self.x.new_ones(shape.features)
        self.wanted = self.x.double() @ weights[-1].double().t()
        self._pdl = device.type == "cuda"

    def library(self) -> None:
        for weight in self.weights:
            torch.mm(self.x, weight.t(), out=self.out)
            self._behind(self.out)

    def ours(self, tiles: ProductTiles) -> Callable[[], None]:
        """Leaves the last product in `y`, that of o and down in parts."""
        self.y = y = self.residual.new_empty(tiles.parts, *self.out.shape) if self.shape.summed else self.out

        def launch() -> None:
            for weight in self.weights:
                with replaced(always(tiles), (module, "product_tiles")):
                    product(y, self.x, weight, pdl=self._pdl)
                self._behind(y)

        return launch

    def error(self) -> float:
        """Of what was computed last, relative to the largest that is wanted."""
        found = self.y.double().sum(0) if self.shape.summed else self.y.double()
        return float((found - self.wanted).abs().max() / self.wanted.abs().max())

    def _behind(self, y: Tensor) -> None:
        if self.shape.summed:
            add_rms_norm(self.out, self.residual, y, self.norm, 1e-5, pdl=self._pdl)


def measure(report: Report, axes: Axes, measured: Measured) -> None:
    """The library, what is launched now, and each tile; a tile that the device refuses is left out."""
    shape, rows, count = measured.shape, measured.rows, len(measured.weights)

    def times(step: Callable[[], None]) -> list[float]:
        return [t * 1e3 / count for t in graph_times(step, axes.repeats)]

    name = f"{shape.name}, {rows} rows"
    megabytes = shape.features * shape.inner * 2 / 1e6
    library = report.add(f"{name}: library", "us", times(measured.library), note=f"{megabytes:.4g} MB").median
    device = measured.x.device
    now = product_tiles(rows, shape.features, shape.inner, multiprocessors(device), summed=shape.summed)
    for label, tiles in [("now", now), *((told(t), t) for t in axes.tiles(shape, rows, device))]:
        try:
            found = times(measured.ours(tiles))
        except Exception as error:
            print(f"refused: {name}, {label}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        note = f"{statistics.median(found) / library:.3f} x library, error {measured.error():.1e}"
        report.add(f"{name}: {label}", "us", found, note=note)


def told(tiles: ProductTiles) -> str:
    shape = f"{tiles.programs} x {tiles.parts} of {tiles.columns} x {tiles.inner}"
    return f"{shape}, {tiles.warps} warps, {tiles.stages} stages{', whole' if tiles.tma else ''}"


def compile_all(axes: Axes, all_measured: Sequence[Measured]) -> None:
    """Several kernels at a time, before any is timed."""
    with compiling_ahead(default_threads(), lambda done, asked: None):
        for measured in all_measured:
            for tiles in axes.tiles(measured.shape, measured.rows, measured.x.device):
                with contextlib.suppress(Exception):  # told when it is timed
                    measured.ours(tiles)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in FULL.shapes])
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    axes = SMALL if arguments.tiny else FULL
    if arguments.rows:
        axes = replace(axes, rows=tuple(arguments.rows))
    if arguments.shapes:
        axes = replace(axes, shapes=tuple(s for s in axes.shapes if s.name in arguments.shapes))
    report = Report(f"product_tiles{SHORT if arguments.tiny else ''}", arguments.commit, folder=arguments.folder)
    device, dtype = default_device(), torch.float32 if arguments.tiny else torch.bfloat16
    with torch.inference_mode():
        for shape in axes.shapes:
            count = 1 if arguments.tiny else max(2, cdiv(BEYOND_CACHE, shape.features * shape.inner * 2))
            weights = [torch.randn(shape.features, shape.inner, device=device).to(dtype) for _ in range(count)]
            sized = [Measured(shape, rows, weights) for rows in axes.rows]
            if device.type == "cuda":
                compile_all(axes, sized)
            for measured in sized:
                measure(report, axes, measured)


if __name__ == "__main__":
    main()

"""Shrink and expand by themselves, one axis after the other: microseconds a layer, and the fraction of the floor.

    python -m benchmarks.kernels_sweep [--commit HASH] [--folder benchmarks/results] [--tiny]

Axes: tokens and ranks, adapters in the batch, their popularity, slots configured. --tiny: a tiny shape; with
TRITON_INTERPRET=1 it needs no accelerator.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.device_timing import default_device, graph_times, matrix_rate, read_rate
from benchmarks.floors import LLAMA_DIMS, TINY, Sizes
from benchmarks.report import Report, asked
from benchmarks.traffic import zipf
from engine.models.device_decoder import lora_groups
from engine.models.dims import LORA_MODULES, ModelDims
from kernels.launch import lora_tile
from kernels.lora_expand import lora_expand
from kernels.lora_gather import lora_gather
from kernels.lora_meta import LoraBounds, LoraGroup
from kernels.lora_shrink import lora_shrink
from tests.kernels.build import LoraStep, make_adapters, make_lora_step

POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")
BEYOND_CACHE = 200_000_000  # bytes of adapters that the layers of one measurement read together


@dataclass(frozen=True, slots=True)
class Case:
    """`active` adapters are at hand; which of them the tokens name is their popularity's."""

    tokens: int
    rank: int
    active: int
    popularity: str
    slots: int  # configured

    @property
    def name(self) -> str:
        batch = f"{self.tokens} tokens, rank {self.rank}, {self.active} adapters {self.popularity}"
        return f"LoRA kernels: {batch}, {self.slots} slots"


@dataclass(frozen=True, slots=True)
class Axes:
    dims: ModelDims
    dtype: torch.dtype
    sizes: Sizes
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    active: tuple[int, ...]
    slots: tuple[int, ...]
    centre: Case
    repeats: int

    def cases(self) -> Iterator[Case]:
        centre = self.centre
        for tokens, rank in itertools.product(self.tokens, self.ranks):
            yield replace(centre, tokens=tokens, rank=rank, active=min(centre.active, tokens))
        for active in self.active:
            yield replace(centre, tokens=max(self.active), active=active, popularity="distinct")
        for popularity in POPULARITIES:
            yield replace(centre, tokens=max(self.active), active=max(self.active) // 2, popularity=popularity)
        for slots in self.slots:
            yield replace(centre, active=min(self.slots), slots=slots)


FULL = Axes(
    LLAMA_DIMS, torch.bfloat16, Sizes(), (1, 8, 32, 128, 512, 2048, 8192), (8, 16, 64, 256), (1, 2, 4, 8, 16, 32, 64),
    (8, 16, 32, 64), Case(32, 16, 8, "uniform", 64), 15,
)  # fmt: skip
SMALL = Axes(
    ModelDims(1, 16, 16, 1, 1, 16, 64), torch.float32, TINY, (2,), (8,), (1, 2), (2,),
    Case(2, 8, 2, "uniform", 2), 1,
)  # fmt: skip


def tokens_by_adapter(case: Case) -> list[int]:
    """How many tokens name each of the active adapters, the most popular first; all are of the case's tokens."""
    names = [str(i) for i in range(case.active)]
    match case.popularity:
        case "distinct":
            drawn: Iterator[str] = itertools.cycle(names)
        case "uniform" | "zipf":
            drawn = zipf(names, float(case.popularity == "zipf"), seed=1)
        case "identical":
            drawn = itertools.repeat(names[0])
        case _:  # one has half of all tokens
            rest = itertools.cycle(names[1:] or names)
            drawn = (names[0] if i % 2 else next(rest) for i in itertools.count())
    counts = Counter(itertools.islice(drawn, case.tokens))
    return [counts[name] for name in names]


def floor(case: Case, axes: Axes, used: int, reads: float, matrix: float) -> float:
    """Microseconds a layer: adapters in use, inputs and deltas at the read rate, or the products at the matrix rate."""
    groups = lora_groups(axes.dims)
    features = sum(sum(axes.dims.module_shape(module)) for module in LORA_MODULES)
    rows = case.tokens * sum(group.inner + sum(group.features) for group in groups)
    size = (used * case.rank * features + rows) * axes.dtype.itemsize
    return max(size / reads, 2 * case.tokens * case.rank * features / matrix) * 1e6


def measure(case: Case, axes: Axes) -> tuple[list[float], int]:
    """(microseconds a layer, adapters in use)."""
    torch.manual_seed(case.tokens + case.rank)
    dims, device, counts = axes.dims, default_device(), tokens_by_adapter(case)
    shapes = [dims.module_shape(module) for module in LORA_MODULES]
    size = sum(a + b for a, b in shapes) * case.rank * axes.dtype.itemsize * sum(count > 0 for count in counts)
    layers = min(dims.layers, -(-BEYOND_CACHE // size))
    ranks = torch.zeros(case.slots, layers, len(LORA_MODULES), dtype=torch.int32)
    ranks[: case.active] = case.rank
    tile = lora_tile(case.tokens, prefill=True)
    bounds = LoraBounds(case.tokens, tile, case.slots, -(-case.rank // 16))
    adapters = make_adapters(ranks, shapes, bounds.rank_blocks, axes.dtype, device, 0.02)
    groups = [(slot, count) for slot, count in enumerate(counts) if count]
    step = make_lora_step(bounds, adapters, groups)
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    run = Launches(lora_groups(dims), step, adapters.arena, layers, case.tokens)
    return [time * 1e3 / layers for time in graph_times(run, axes.repeats)], len(groups)


class Launches:
    """Shrink and expand of every product of every layer."""

    def __init__(
        self, groups: Sequence[LoraGroup], step: LoraStep, arena: torch.Tensor, layers: int, tokens: int
    ) -> None:
        self._groups, self._step, self._arena, self._layers = groups, step, arena, layers
        like = arena.new_empty
        self._x = [like(tokens, group.inner).normal_() for group in groups]
        self._delta = [like(tokens, sum(group.features)) for group in groups]

    def __call__(self) -> None:
        meta, arena = self._step.meta, self._arena
        for layer in range(self._layers):
            for group, x, delta in zip(self._groups, self._x, self._delta, strict=True):
                lora_shrink(x, arena, meta, layer, group)
                lora_expand(delta, arena, meta, layer, group, add=False)


def sweep(axes: Axes, report: Report) -> None:
    reads, matrix = read_rate(axes.sizes.reads), matrix_rate(axes.sizes.matrix)
    report.add("floor: memory reads", "TB/s", [reads / 1e12])
    report.add("floor: matrix rate", "TFLOP/s", [matrix / 1e12])
    for case in dict.fromkeys(axes.cases()):
        times, used = measure(case, axes)
        least = floor(case, axes, used, reads, matrix)
        note = f"{used} in use, floor {least:.1f} us, {least / statistics.median(times):.2f} of it"
        report.add(case.name, "us a layer", times, note=note)


def main(argv: Sequence[str] | None = None) -> None:
    report, tiny = asked("kernels_sweep", __doc__, argv)
    sweep(SMALL if tiny else FULL, report)


if __name__ == "__main__":
    main()

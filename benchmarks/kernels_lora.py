"""LoRA at Llama-3.1-8B's shape: what shrink and expand add to the products of a step, beside them and behind them."""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import device_timing as timing
from benchmarks.report import Report
from kernels import launch, lora_expand, lora_meta, lora_shrink, reference
from kernels.launch import ExpandTiles, ShrinkTiles
from kernels.layout import KvLayout
from kernels.lora_gather import lora_gather
from kernels.lora_meta import LoraBounds, LoraGroup
from kernels.norm import add_rms_norm
from kernels.rotary import rotary_store
from kernels.silu_mul import silu_mul
from tests.kernels.build import Adapters, LoraStep, error, make_adapters, make_lora_step

DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
HIDDEN, INNER, LAYERS = 4096, 14336, 32
SHAPES = (
    (HIDDEN, 4096),
    (HIDDEN, 1024),
    (HIDDEN, 1024),
    (4096, HIDDEN),
    (HIDDEN, INNER),
    (HIDDEN, INNER),
    (INNER, HIDDEN),
)
GROUPS = (
    LoraGroup(0, HIDDEN, (4096, 1024, 1024)),
    LoraGroup(3, 4096, (HIDDEN,)),
    LoraGroup(4, HIDDEN, (INNER, INNER)),
    LoraGroup(6, INNER, (HIDDEN,)),
)
CASES = ((1, 1, 16), (8, 8, 16), (32, 1, 16), (32, 8, 16), (64, 32, 16), (32, 8, 64), (128, 8, 16))
SPLITS = (1, 2, 4, 8)
SHRINKS = ((128, 4, 4), (512, 8, 2), (256, 8, 3), (256, 2, 3))  # inner, warps, stages
SPLIT_EXPANDS = ((256, 4, 2), (128, 4, 2), (128, 2, 2))  # columns, warps, stages; with every split
EXPANDS = ((512, 8, 2), (256, 4, 3), (256, 8, 2))
# tokens, tiles, and the same for steps of many tokens
PREFILLS = ((8192, (128,)), (2048, (64, 128)), (512, (16, 32, 64, 128)))
PREFILL_SHRINKS = ((128, 4, 3), (64, 8, 3))
PREFILL_EXPANDS = ((256, 8, 2), (128, 8, 1), (128, 4, 2))


@dataclass(frozen=True)
class Model:
    """One decoder's linear weights, and the buffers of a step without its attention."""

    weights: list[list[Tensor]]
    x: dict[int, Tensor]  # inputs by width, [tokens, width]
    y: list[Tensor]  # base products of the four groups
    delta: list[Tensor]
    residual: Tensor
    norm: Tensor
    arena: Tensor
    layout: KvLayout
    places: Tensor
    table: Tensor


def make_weights(layers: int) -> list[list[Tensor]]:
    def weight(group: LoraGroup) -> Tensor:
        return torch.randn(sum(group.features), group.inner, device=DEVICE, dtype=DTYPE) * 0.02

    return [[weight(group) for group in GROUPS] for _ in range(layers)]


def make_model(weights: list[list[Tensor]], tokens: int) -> Model:
    def rows(width: int) -> Tensor:
        return torch.randn(tokens, width, device=DEVICE).to(DTYPE)

    layout = KvLayout(1, 8, 16, 128)
    y = [rows(sum(group.features)) for group in GROUPS]
    return Model(
        weights,
        {HIDDEN: rows(HIDDEN), INNER: rows(INNER)},
        y,
        [torch.zeros_like(t) for t in y],
        rows(HIDDEN),
        rows(HIDDEN)[0].clone(),
        torch.zeros(tokens // 16 + 1, layout.elements, device=DEVICE, dtype=DTYPE),
        layout,
        torch.arange(tokens, device=DEVICE, dtype=torch.int32),
        torch.randn(8192, 128, device=DEVICE),
    )


def follow(model: Model, group: int, out: Tensor, delta: Tensor | None, delta_rows: Tensor) -> None:
    """The op that comes after a product anyway; it adds the delta."""
    y, used = model.y[group], None if delta is None else delta_rows
    if group == 0:
        rotary_store(
            out[:, :4096], y, model.arena, model.layout, 0, model.places, model.places, model.table, delta=delta,
            delta_rows=used,
        )  # fmt: skip
    elif group == 2:
        silu_mul(out, y, delta=delta, delta_rows=used)
    else:
        add_rms_norm(out, model.residual, y, model.norm, 1e-5, delta=delta, delta_rows=used)


def delta_of(model: Model, adapters: Adapters, step: LoraStep, layer: int, group: int, out: Tensor, add: bool) -> None:
    lora_shrink.lora_shrink(model.x[GROUPS[group].inner], adapters.arena, step.meta, layer, GROUPS[group])
    lora_expand.lora_expand(out, adapters.arena, step.meta, layer, GROUPS[group], add=add)


def run_step(model: Model, adapters: Adapters, step: LoraStep, mode: str, side: torch.cuda.Stream) -> None:
    """All layers; mode: none, behind (added to the product) or beside (a second branch computes a delta)."""
    main = torch.cuda.current_stream()
    if mode != "none":
        lora_gather(step.meta, adapters.pieces, adapters.ranks)
    spare = {HIDDEN: torch.empty_like(model.x[HIDDEN]), INNER: torch.empty_like(model.x[INNER])}
    for layer, weights in enumerate(model.weights):
        for group, shape in enumerate(GROUPS):
            if mode == "beside":
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    delta_of(model, adapters, step, layer, group, model.delta[group], False)
            torch.mm(model.x[shape.inner], weights[group].t(), out=model.y[group])
            if mode == "behind":
                delta_of(model, adapters, step, layer, group, model.y[group], True)
            if mode == "beside":
                main.wait_stream(side)
            delta = model.delta[group] if mode == "beside" else None
            follow(model, group, spare[INNER if group == 2 else HIDDEN], delta, step.meta.rows(GROUPS[group]))


def check(model: Model, adapters: Adapters, step: LoraStep) -> float:
    """Largest relative error of a few rows of each module's delta in the last layer, against float64."""
    layer, worst, rows = len(model.weights) - 1, 0.0, min(step.rows, 4)
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    for group, shape in enumerate(GROUPS):
        model.delta[group].fill_(float("nan"))
        delta_of(model, adapters, step, layer, group, model.delta[group], False)
        parts = torch.split(model.delta[group][step.rows - rows : step.rows], list(shape.features), 1)
        for module, part in enumerate(parts, shape.first):
            args = (
                adapters.arena,
                adapters.pieces,
                adapters.ranks,
                step.slots[step.rows - rows : step.rows],
                layer,
                module,
            )
            x = model.x[SHAPES[module][0]][step.rows - rows : step.rows].double()
            wanted = reference.lora_expand(reference.lora_shrink(x, *args), torch.zeros_like(part).double(), *args)
            off = error(part, wanted)
            worst = off if off != off or off > worst else worst
        model.delta[group].zero_()
    return worst


@dataclass(frozen=True)
class Case:
    """A model, adapters and a step to be timed in every mode, and the base's own time."""

    report: Report
    name: str
    model: Model
    adapters: Adapters
    step: LoraStep
    side: torch.cuda.Stream
    repeats: int
    base: float = 0.0  # ms

    def times(self, mode: str) -> list[float]:
        return timing.graph_times(lambda: run_step(self.model, self.adapters, self.step, mode, self.side), self.repeats)

    def measured(self, floor: float) -> "Case":
        times = self.times("none")
        note = f"adapter bytes {floor:.3f} ms, error {check(self.model, self.adapters, self.step):.1e}"
        self.report.add(f"{self.name}: base", "ms", times, note=note)
        return replace(self, base=statistics.median(times))

    def added(self, mode: str, note: str = "") -> None:
        times = self.times(mode)
        ratio = statistics.median(times) / self.base
        more = [t - self.base for t in times]
        self.report.add(f"{self.name}: {mode} {note}".rstrip(), "ms more", more, note=f"x{ratio:.3f}")


def make_case(
    report: Report, name: str, weights: list[list[Tensor]], bounds: LoraBounds, count: int, rank: int
) -> Case:
    torch.manual_seed(bounds.tokens + count + rank)
    layers = len(weights)
    ranks = torch.full((count, layers, 7), rank, dtype=torch.int32)
    adapters = make_adapters(ranks, SHAPES, bounds.rank_blocks, DTYPE, DEVICE, 0.02)
    step = make_lora_step(bounds, adapters, [(slot, bounds.tokens // count) for slot in range(count)])
    side = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
    return Case(report, name, make_model(weights, bounds.tokens), adapters, step, side, 15 if bounds.tile == 16 else 8)


def lora(report: Report, tune: bool) -> None:
    """gpu.md's table: decode steps without attention."""
    weights, rate = make_weights(LAYERS), timing.read_rate()
    for batch, count, rank in CASES:
        bounds = LoraBounds(batch, 16, max(8, count), -(-rank // 16))
        floor = count * rank * sum(a + b for a, b in SHAPES) * 2 * LAYERS / rate * 1e3
        name = f"LoRA batch {batch} adapters {count} rank {rank}"
        case = make_case(report, name, weights, bounds, count, rank).measured(floor)
        case.added("beside")
        case.added("behind")
        if tune:
            decode_tiles(case, lora_meta.split_bound(bounds))


def decode_tiles(case: Case, most: int) -> None:
    """Every number of splits with a few expands, then other tiles with the kernels' own splits."""
    for splits in (s for s in SPLITS if s <= most):
        shrink = ShrinkTiles(256, splits, False, 4, 3)
        for expand in SPLIT_EXPANDS:
            try_tiles(case, "beside", [shrink], ExpandTiles(*expand))
    try_tiles(case, "beside", [ShrinkTiles(i, min(4, most), False, w, n) for i, w, n in SHRINKS])
    for expand in EXPANDS:
        try_tiles(case, "beside", [], ExpandTiles(*expand))


def lora_prefill(report: Report, tune: bool) -> None:
    """Steps of many tokens of 8 adapters over four layers: the base's products, and what LoRA adds."""
    weights = make_weights(4)
    for tokens, tiles in PREFILLS:
        for tile in tiles if tune else (launch.PREFILL_TILE,):
            name, bounds = f"LoRA {tokens} tokens, 4 layers, tile {tile}", LoraBounds(tokens, tile, 8, 1)
            case = make_case(report, name, weights, bounds, 8, 16).measured(0.0)
            case.added("beside")
            case.added("behind")
            if tune and tokens == 8192:
                try_tiles(case, "beside", [ShrinkTiles(i, 1, True, w, n) for i, w, n in PREFILL_SHRINKS])
                for expand in PREFILL_EXPANDS:
                    try_tiles(case, "beside", [], ExpandTiles(*expand))


def try_tiles(case: Case, mode: str, shrinks: list[ShrinkTiles], expand: ExpandTiles | None = None) -> None:
    """The case with each of these in place of the kernels' own choice."""
    with ExitStack() as stack:
        if expand:
            stack.enter_context(timing.replaced(timing.always(expand), (lora_expand, "expand_tiles")))
        note = f"expand {expand.columns} {expand.warps} {expand.stages}" if expand else ""
        if not shrinks:
            case.added(mode, note)
        for shrink in shrinks:
            with timing.replaced(timing.always(shrink), (lora_shrink, "shrink_tiles"), (lora_expand, "shrink_tiles")):
                case.added(
                    mode, f"shrink {shrink.inner} {shrink.splits} {shrink.warps} {shrink.stages} {note}".rstrip()
                )

"""The torch paths of LoRA against the plain reference, and against each other to the bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.adapters.merged import PieceViews, merge
from engine.geometry import Geometry, make_geometry
from engine.layers.linear import cpu_has_bfloat16, make_product
from engine.layers.lora import SITE_MODULES, BaseOnly, LoraPath, Segment, SegmentedLora, StackedLora, owner_of_tokens
from engine.models.dims import LORA_MODULES, ModelDims
from kernels.reference import lora_expand, lora_shrink
from tests.engine.worker.harness import make_pages, random_weights

Runs = Sequence[tuple[int | None, int]]
DIMS = ModelDims(layers=2, hidden=72, intermediate=104, heads=6, kv_heads=2, head_dim=20, vocab=50)
RANKS: tuple[dict[int, int], ...] = (
    {0: 8, 2: 3},
    dict.fromkeys(range(7), 16),
    {1: 40, 3: 40, 5: 21, 6: 100},
    {4: 1},
)
ADAPTERS = (1, 2, 3, 4)
# Tokens sorted by slot, the base last.
RUNS: dict[str, tuple[tuple[int | None, int], ...]] = {
    "one each": ((1, 1), (2, 1), (3, 1), (4, 1), (None, 1)),
    "uneven": ((1, 3), (3, 17), (None, 5)),
    "identical": ((2, 9),),
    "base and one": ((4, 1), (None, 30)),
    "everyone": ((1, 7), (2, 1), (3, 12), (4, 5), (None, 2)),
}


@dataclass
class Bench:
    """Four adapters in an arena, with the tables that kernels read and the views that torch reads."""

    arena: Tensor
    pieces: Tensor
    ranks: Tensor
    views: dict[int, PieceViews]


def bench(dtype: torch.dtype) -> Bench:
    geometry = make_geometry(DIMS, dtype.itemsize)
    arena, first = torch.full((200, geometry.chunk_elements), float("nan"), dtype=dtype), 3
    blocks = max(-(-rank // 16) for ranks in RANKS for rank in ranks.values())
    made = Bench(
        arena=arena,
        pieces=torch.full((len(RANKS), DIMS.layers, 7, 2, blocks), -1, dtype=torch.int32),
        ranks=torch.zeros(len(RANKS), DIMS.layers, 7, dtype=torch.int32),
        views={},
    )
    for slot, ranks in enumerate(RANKS):
        first += place(made, geometry, slot, ranks, first) + 1
    return made


def place(made: Bench, geometry: Geometry, slot: int, ranks: dict[int, int], first: int) -> int:
    """Copies an adapter to the chunks from `first` on; returns how many."""
    pages = make_pages(random_weights(DIMS, ranks, slot), geometry, made.arena.dtype)
    views: dict[tuple[int, int], list[list[Tensor]]] = {}
    for index, page in enumerate(pages.pages):
        made.arena.view(torch.uint8)[first + index] = page
    for p in pages.layout.places:
        start = (first + p.chunk) * geometry.chunk_bytes + p.offset
        made.pieces[slot, p.layer, p.module, p.side, p.rank_block] = start // 256
        made.ranks[slot, p.layer, p.module] += p.ranks * (p.side == 0)
        inn, out = DIMS.module_shape(LORA_MODULES[p.module])
        shape = (p.ranks, inn) if p.side == 0 else (out, p.ranks)
        view = made.arena.view(-1)[start // geometry.itemsize :][: shape[0] * shape[1]].view(shape)
        blocks = views.setdefault((p.layer, p.module), [])
        if p.side == 0:
            blocks.append([])
        blocks[p.rank_block].append(view)
    made.views[ADAPTERS[slot]] = {key: [(a, b) for a, b in blocks] for key, blocks in views.items()}
    return len(pages.pages)


def segmented(made: Bench, runs: Runs) -> LoraPath:
    segments, start = [], 0
    for owner, length in runs:
        if owner is not None:
            segments.append(Segment(start, start + length, merge(DIMS, {owner: made.views[owner]})))
        start += length
    return SegmentedLora(segments)


def stacked(made: Bench, runs: Runs, members: Sequence[int] = ADAPTERS) -> LoraPath:
    stack = merge(DIMS, {member: made.views[member] for member in members})
    return StackedLora(stack, owner_of_tokens([o for o, _ in runs], [n for _, n in runs], stack))


def inputs(site: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(x, base weight, addend) of a site."""
    torch.manual_seed(tokens)
    shapes = [DIMS.module_shape(LORA_MODULES[module]) for module in SITE_MODULES[site]]
    inn, out = shapes[0][0], sum(shape[1] for shape in shapes)
    x, weight, addend = torch.randn(tokens, inn), torch.randn(out, inn) * 0.2, torch.randn(tokens, out)
    return x.to(dtype), weight.to(dtype), addend.to(dtype)


def reference(made: Bench, runs: Runs, layer: int, site: int, x: Tensor) -> Tensor:
    """The deltas alone, in float32."""
    slots = torch.cat([torch.full((n,), -1 if o is None else ADAPTERS.index(o)) for o, n in runs])
    parts = []
    for module in SITE_MODULES[site]:
        y = torch.zeros(len(x), DIMS.module_shape(LORA_MODULES[module])[1])
        z = lora_shrink(x, made.arena, made.pieces, made.ranks, slots, layer, module)
        parts.append(lora_expand(z, y, made.arena, made.pieces, made.ranks, slots, layer, module))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("path", [segmented, stacked])
@pytest.mark.parametrize("site", range(4))
@pytest.mark.parametrize("with_addend", [False, True])
@torch.inference_mode()
def test_paths_match_reference(
    runs: Runs, path: Callable[[Bench, Runs], LoraPath], site: int, with_addend: bool
) -> None:
    made = bench(torch.float32)
    x, weight, addend = inputs(site, sum(n for _, n in runs), torch.float32)
    for layer in range(DIMS.layers):
        found = path(made, runs).product(layer, site, make_product(weight), x, addend if with_addend else None)
        expected = x @ weight.T + reference(made, runs, layer, site, x) + (addend if with_addend else 0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


needs_bfloat16 = pytest.mark.skipif(not cpu_has_bfloat16(), reason="the CPU does not multiply bfloat16 natively")


@needs_bfloat16
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("site", range(4))
@pytest.mark.parametrize("with_addend", [False, True])
@torch.inference_mode()
def test_paths_agree_to_the_bit(runs: Runs, site: int, with_addend: bool) -> None:
    """Segments, a stack of all, a stack in another order; and the base's rows are those of the base alone."""
    made = bench(torch.bfloat16)
    x, weight, addend = inputs(site, sum(n for _, n in runs), torch.bfloat16)
    base, extra = make_product(weight), addend if with_addend else None
    first = segmented(made, runs).product(1, site, base, x, extra)
    for path in (stacked(made, runs), stacked(made, runs, (3, 1, 4, 2))):
        assert torch.equal(path.product(1, site, base, x, extra), first)
    alone = BaseOnly().product(1, site, base, x, extra)
    owned = torch.cat([torch.full((n,), o is not None) for o, n in runs])
    assert torch.equal(first[~owned], alone[~owned])


@torch.inference_mode()
def test_infinity_of_another_adapter_does_not_leak() -> None:
    """One token's product with its own A overflows; the tokens of others have the bits they have without it."""
    made, runs = bench(torch.float32), ((1, 2), (2, 2), (None, 2))
    x, weight, _ = inputs(0, 6, torch.float32)
    base = make_product(weight)
    calm = stacked(made, runs).product(0, 0, base, x)
    for blocks in made.views[1].values():
        for a, _ in blocks:
            a.mul_(1e38)
    wild = stacked(made, runs).product(0, 0, base, x)
    assert not wild[:2].isfinite().all()
    assert torch.equal(wild[2:], calm[2:])


@torch.inference_mode()
def test_addend_is_left_alone() -> None:
    made, runs = bench(torch.float32), RUNS["everyone"]
    x, weight, addend = inputs(1, sum(n for _, n in runs), torch.float32)
    before = addend.clone()
    for path in (segmented(made, runs), stacked(made, runs)):
        path.product(0, 1, make_product(weight), x, addend)
        assert torch.equal(addend, before)

"""Packing: every piece once, aligned, within its chunk, apart from all others, and little room wasted."""

import random
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters.layout import Layout, pack, stored_ranks
from engine.adapters.spec import ModuleSpec
from engine.geometry import PIECE_ALIGN, Geometry, make_geometry
from engine.models.dims import LORA_MODULES, ModelDims

DEMO = ModelDims(30, 576, 1536, 9, 3, 64, 49152)
LLAMA_8B = ModelDims(32, 4096, 14336, 32, 8, 128, 128256)
TINY = ModelDims(2, 24, 40, 3, 1, 8, 97)
SHAPES = [DEMO, LLAMA_8B, TINY]


def uniform(dims: ModelDims, rank: int, modules: tuple[str, ...] = LORA_MODULES) -> list[ModuleSpec]:
    indices = [LORA_MODULES.index(module) for module in modules]
    return [ModuleSpec(layer, module, rank, 1.0) for layer in range(dims.layers) for module in indices]


@st.composite
def adapters(draw: st.DrawFn) -> tuple[ModelDims, Geometry, list[ModuleSpec]]:
    """A base, its geometry, and modules of an adapter: any subset, each with a rank of its own."""
    dims = draw(st.sampled_from(SHAPES))
    geometry = make_geometry(dims, draw(st.sampled_from([2, 4])))
    choice = random.Random(draw(st.integers(0, 2**32)))
    ranks = draw(st.lists(st.integers(1, 256), min_size=1, max_size=4))
    share = draw(st.floats(0.05, 1))
    modules = [
        ModuleSpec(layer, module, choice.choice(ranks), 1.0)
        for layer in range(dims.layers)
        for module in range(len(LORA_MODULES))
        if choice.random() < share
    ]
    return dims, geometry, modules or [ModuleSpec(0, 0, ranks[0], 1.0)]


def check(layout: Layout, dims: ModelDims, geometry: Geometry, modules: list[ModuleSpec]) -> None:
    ranks: dict[tuple[int, int, int], int] = defaultdict(int)
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place in layout.places:
        assert place.offset % PIECE_ALIGN == 0
        assert place.ranks in (8, 16)
        features = dims.module_shape(LORA_MODULES[place.module])[place.side]
        end = place.offset + place.ranks * features * geometry.itemsize
        assert end <= geometry.chunk_bytes
        spans[place.chunk].append((place.offset, end))
        ranks[place.layer, place.module, place.side] += place.ranks
    assert sorted(spans) == list(range(layout.chunks))
    for found in spans.values():
        found.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(found))
    assert ranks == {(m.layer, m.module, side): stored_ranks(m.rank) for m in modules for side in (0, 1)}
    blocks = [(p.layer, p.module, p.side, p.rank_block) for p in layout.places]
    assert len(set(blocks)) == len(blocks)


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_pieces_lie_apart_and_whole(adapter: tuple[ModelDims, Geometry, list[ModuleSpec]]) -> None:
    dims, geometry, modules = adapter
    layout = pack(modules, dims, geometry)
    check(layout, dims, geometry, modules)
    assert pack(modules, dims, geometry) == layout
    assert layout.bytes == layout.chunks * geometry.chunk_bytes


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_waste_is_bounded(adapter: tuple[ModelDims, Geometry, list[ModuleSpec]]) -> None:
    """All chunks but the last are at least 92 % full; a chunk holds twice the largest piece, so two thirds for any."""
    dims, geometry, modules = adapter
    layout = pack(modules, dims, geometry)
    assert (layout.chunks - 1) * geometry.chunk_bytes <= layout.piece_bytes / 0.66
    if dims is LLAMA_8B:
        assert (layout.chunks - 1) * geometry.chunk_bytes <= layout.piece_bytes / 0.92


@pytest.mark.parametrize("dims", [DEMO, LLAMA_8B])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [16, 24, 32, 64, 100, 256])
def test_waste_with_all_modules(dims: ModelDims, itemsize: int, rank: int) -> None:
    layout = pack(uniform(dims, rank), dims, make_geometry(dims, itemsize))
    assert 0 <= layout.waste <= 0.08


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), LORA_MODULES[:4], LORA_MODULES[4:], ("down_proj",)])
@pytest.mark.parametrize("dims", [DEMO, LLAMA_8B])
@pytest.mark.parametrize("rank", [1, 8, 16, 40, 256])
def test_the_brain_never_reckons_with_too_few_chunks(dims: ModelDims, rank: int, modules: tuple[str, ...]) -> None:
    geometry = make_geometry(dims, 2)
    assert pack(uniform(dims, rank, modules), dims, geometry).chunks <= geometry.adapter_chunks(dims, rank, modules)


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_mixed_ranks_stay_within_the_bound_of_the_largest(
    adapter: tuple[ModelDims, Geometry, list[ModuleSpec]],
) -> None:
    dims, geometry, modules = adapter
    bound = geometry.adapter_chunks(dims, max(module.rank for module in modules))
    assert pack(modules, dims, geometry).chunks <= bound


def test_a_small_adapter_takes_one_chunk() -> None:
    layout = pack([ModuleSpec(3, 1, 5, 2.0)], DEMO, make_geometry(DEMO, 2))
    assert layout.chunks == 1
    assert [(p.layer, p.module, p.side, p.rank_block, p.ranks, p.chunk) for p in layout.places] == [
        (3, 1, 0, 0, 8, 0),
        (3, 1, 1, 0, 8, 0),
    ]

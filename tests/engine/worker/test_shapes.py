"""Static shapes of steps: the ladder of graphs, the choice of the smallest that holds a step, its lists' sizes."""

import itertools
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.geometry import make_geometry
from engine.models.registry import parse_config
from engine.worker.shapes import LONG_CONTEXT, Machine, Shapes, StepShape, make_machine
from kernels.launch import expand_tiles, narrow_items, shrink_tiles
from kernels.lora_meta import LoraBounds, LoraGroup, PackedLayout, z_elements

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def machine(**changes: object) -> Machine:
    model = parse_config(RAW)
    made = make_machine(EngineConfig(max_lora_rank=64), model, make_geometry(model.dims, 2), 132, 2048, 1024)
    return replace(made, **changes)  # type: ignore[arg-type]


def lora_kernels(bounds: LoraBounds) -> tuple[object, ...]:
    """What kernels of a bucket are compiled for."""
    groups = LoraGroup(0, 4096, (4096, 1024)), LoraGroup(3, 4096, (4096,)), LoraGroup(6, 14336, (4096,))
    shrinks = tuple(shrink_tiles(bounds, group, 2) for group in groups)
    return bounds.tile, bounds.large, shrinks, expand_tiles(bounds, 2), expand_tiles(bounds, 4)


def test_every_graph_is_chosen_by_the_steps_that_it_holds() -> None:
    shapes = Shapes(machine(), None)
    for lora in (False, True):
        captured = shapes.graphs(lora=lora)
        assert len(set(captured)) == len(captured)
        for shape in captured:
            if shape.prefill:
                assert shapes.choose(shape.tokens, 1, lora=lora) is shape
            else:
                assert shapes.choose(shape.tokens, shape.tokens, lora=lora, narrow=shape.narrow) is shape


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_compiled_ahead_stands_for_every_eager_step(lora: bool) -> None:
    """Samples by powers of two, all rows, long contexts; every tile that LoRA's kernels take."""
    shapes = Shapes(machine(max_context=2 * LONG_CONTEXT, step_tokens=8192), 64)
    ahead = shapes.eager(lora=lora)
    kinds = {(lora_kernels(s.lora_bounds), s.last_rows, s.long) for s in ahead}
    samples = {s.sequences for s in ahead if s.last_rows}
    for tokens, sequences, all_rows, context in itertools.product(
        (1025, 1500, 2048, 2049, 4096, 4097, 8192), (1, 2, 33, 64, 200, 256), (False, True), (100, LONG_CONTEXT + 1)
    ):
        shape = shapes.choose(tokens, sequences, lora=lora, all_rows=all_rows, context=context)
        assert (lora_kernels(shape.lora_bounds), shape.last_rows, shape.long) in kinds
        assert not shape.last_rows or shape.sequences in samples
    assert len(ahead) < 20


@pytest.mark.parametrize("limit", [1, 5, 16, 100, 256])
def test_ladder_ends_at_the_limit(limit: int) -> None:
    buckets = Shapes(machine(), limit).decode_buckets
    assert buckets[-1] == limit
    assert list(buckets) == sorted(set(buckets))


def test_a_step_fits_its_shape() -> None:
    shapes = Shapes(machine(), 64)
    for tokens in range(1, 1025, 7):
        for sequences in {1, min(tokens, 30), min(tokens, 256)}:
            shape = shapes.choose(tokens, sequences, lora=True)
            assert shape.tokens >= tokens
            assert shape.sequences >= sequences
            assert shape.prefill or tokens == sequences
            assert shape.attention.q_tile > 0 or not shape.prefill


@pytest.mark.parametrize(("step_tokens", "slots"), [(256, 64), (512, 8), (1024, 8), (2048, 64), (8192, 8)])
def test_largest_shapes_bound_all_others(step_tokens: int, slots: int) -> None:
    shapes = Shapes(machine(step_tokens=step_tokens, slots=slots), 64)
    sizes = [_sizes(shape) for shape in shapes.largest()]
    most = [max(column) for column in zip(*sizes, strict=True)]
    for count in {*range(1, step_tokens, 97), step_tokens}:
        for sequences in (1, min(count, 100), min(count, 256)):
            shape = shapes.choose(count, sequences, lora=True)
            assert all(size <= bound for size, bound in zip(_sizes(shape), most, strict=True)), shape


def _sizes(shape: StepShape) -> tuple[int, ...]:
    """Of everything that is allocated once for all shapes."""
    lists = [shape.lora_bounds, *([shape.last_bounds] if shape.last_rows else [])]
    items, work, z = (max(sizes) for sizes in zip(*((b.items, b.work, z_elements(b)) for b in lists), strict=True))
    return shape.tokens, shape.sequences, shape.layout.size, items, work, z


def test_a_step_that_no_buffer_holds_is_refused() -> None:
    shapes = Shapes(machine(), None)
    with pytest.raises(ValueError, match="larger than the worker's largest"):
        shapes.choose(1025, 1, lora=False)
    with pytest.raises(ValueError, match="larger than the worker's largest"):
        shapes.choose(600, 257, lora=False)


def test_decodes_beside_a_prompt_chunk_fit() -> None:
    """The scheduler may give prompts a quarter of the step beside as many decodes as run."""
    model = parse_config(RAW)
    config = EngineConfig(max_running_requests=256)
    made = make_machine(config, model, make_geometry(model.dims, 2), 132, 2048, 256)
    assert made.step_tokens == 256 + 64


@pytest.mark.parametrize(
    ("tokens", "sequences", "last_rows"),
    [(500, 3, True), (380, 3, False), (900, 3, True), (900, 256, True), (600, 250, True), (40, 40, False)],
)
def test_the_last_layer_holds_sampled_rows_where_they_are_half_at_most(
    tokens: int, sequences: int, last_rows: bool
) -> None:
    """A graph of 384 tokens may hold 256 samples."""
    shapes = Shapes(machine(), None)
    shape = shapes.choose(tokens, sequences, lora=True)
    assert shape.last_rows == last_rows
    assert ("last_lora_work" in dict(shape.layout.fields)) == last_rows
    assert "last_lora_work" not in dict(shapes.choose(tokens, sequences, lora=False).layout.fields)
    every = shapes.choose(tokens, sequences, lora=True, all_rows=True)
    assert not every.last_rows
    assert (every == shape) == (not last_rows)
    assert every not in shapes.graphs(lora=True) or not last_rows
    assert Shapes(machine(), None, last_rows=False).choose(tokens, sequences, lora=True) == every


def test_long_contexts_have_shapes_of_their_own_but_no_graphs() -> None:
    shapes = Shapes(machine(), None)
    large, small = shapes.graphs(lora=False)[0].tokens + 1, 20
    for tokens, long in ((large, True), (small, False)):
        shape = shapes.choose(tokens, 2, lora=False, context=LONG_CONTEXT + 1)
        assert shape.long == long
        assert (shape == shapes.choose(tokens, 2, lora=False, context=LONG_CONTEXT)) == (not long)


def test_mixed_steps_with_adapters_have_graphs_up_to_small_steps_unless_a_context_is_long() -> None:
    shapes = Shapes(machine(step_tokens=8192, max_context=2 * LONG_CONTEXT), None)
    captured = {lora: shapes.graphs(lora=lora) for lora in (False, True)}
    for tokens in (600, 1024, 1025, 1100, 2048):
        shape = shapes.choose(tokens, 200, lora=True, context=LONG_CONTEXT)
        assert shape in captured[True]
        assert tokens <= shape.tokens < tokens + 128
        assert shapes.choose(tokens, 200, lora=False) not in captured[False]
        assert (shapes.choose(tokens, 200, lora=True, context=LONG_CONTEXT + 1) == shape) == (tokens <= 1024)
    assert shapes.choose(2049, 200, lora=True) not in captured[True]


@pytest.mark.parametrize(("tokens", "rows"), [(961, 1024), (1025, 1152), (1153, 1280), (2048, 2048), (2049, 2304)])
def test_steps_without_a_graph_are_rounded_up_by_little(tokens: int, rows: int) -> None:
    assert Shapes(machine(step_tokens=8192), None).choose(tokens, 9, lora=False).tokens == rows


def test_lists_of_lora_are_in_its_family_alone() -> None:
    shapes = Shapes(machine(two_windows=True), None)
    names = [{name for name, _ in shapes.choose(9, 2, lora=lora).layout.fields} for lora in (False, True)]
    assert names[1] - names[0] == {"lora_items", "lora_work"}
    assert "windowed_decode_items" in names[0]
    assert isinstance(shapes.choose(9, 2, lora=True).layout, PackedLayout)


@pytest.mark.parametrize(
    ("tokens", "sequences", "lora", "tiles"),
    [
        (64, 64, True, (8, 8)),
        (65, 65, True, (16, 8)),
        (256, 256, True, (16, 8)),
        (300, 300, True, (16, 8)),
        (256, 256, False, (16, 16)),
        (256, 255, True, (16, 16)),
        (2304, 3, True, (64, 64)),
    ],
)
def test_decodes_of_many_adapters_have_small_items(
    tokens: int, sequences: int, lora: bool, tiles: tuple[int, int]
) -> None:
    """A shape of their own where others of their size have larger ones."""
    shapes = Shapes(machine(max_running=512, step_tokens=4096), None)
    wide, narrow = (shapes.choose(tokens, sequences, lora=lora, narrow=narrow) for narrow in (False, True))
    assert (wide.lora_bounds.tile, narrow.lora_bounds.tile) == tiles
    assert (wide is narrow) == (tiles[0] == tiles[1])
    assert wide != narrow or wide is narrow


@pytest.mark.parametrize(
    ("rows", "narrow"),
    [([1], True), ([8] * 8, True), ([16] * 8, False), ([2] * 130, True), ([2] * 130 + [255], True), ([51] * 5, False)],
)
def test_items_are_small_where_that_makes_hardly_more_of_them(rows: list[int], narrow: bool) -> None:
    assert narrow_items(rows) == narrow

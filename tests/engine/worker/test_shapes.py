"""Static shapes of steps: the ladder of graphs, the choice of the smallest that holds a step, its lists' sizes."""

from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.geometry import make_geometry
from engine.models.registry import parse_config
from engine.worker.shapes import Machine, Shapes, StepShape, make_machine
from kernels.lora_meta import PackedLayout, z_elements

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


def test_every_graph_is_chosen_by_the_steps_that_it_holds() -> None:
    shapes = Shapes(machine(), None)
    for lora in (False, True):
        captured = shapes.graphs(lora=lora)
        assert len(set(captured)) == len(captured)
        for shape in captured:
            if shape.prefill:
                assert shapes.choose(shape.tokens, 1, lora=lora) is shape
            else:
                assert shapes.choose(shape.tokens, shape.tokens, lora=lora) is shape


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


@pytest.mark.parametrize("step_tokens", [512, 1024, 2048, 8192])
def test_largest_shapes_bound_all_others(step_tokens: int) -> None:
    shapes = Shapes(machine(step_tokens=step_tokens), 64)
    sizes = [_sizes(shape) for shape in shapes.largest()]
    most = [max(column) for column in zip(*sizes, strict=True)]
    for count in {*range(1, step_tokens, 97), step_tokens}:
        for sequences in (1, min(count, 256)):
            shape = shapes.choose(count, sequences, lora=True)
            assert all(size <= bound for size, bound in zip(_sizes(shape), most, strict=True)), shape


def _sizes(shape: StepShape) -> tuple[int, ...]:
    """Of everything that is allocated once for all shapes."""
    bounds = shape.lora_bounds
    return shape.tokens, shape.sequences, shape.layout.size, bounds.items, bounds.work, z_elements(bounds)


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


def test_lists_of_lora_are_in_its_family_alone() -> None:
    shapes = Shapes(machine(two_windows=True), None)
    names = [{name for name, _ in shapes.choose(9, 2, lora=lora).layout.fields} for lora in (False, True)]
    assert names[1] - names[0] == {"lora_items", "lora_work"}
    assert "windowed_decode_items" in names[0]
    assert isinstance(shapes.choose(9, 2, lora=True).layout, PackedLayout)

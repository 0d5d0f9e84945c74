"""Which steps overlap what, and which bytes of which weights are fetched. The GPU tests compare the results."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.models.device_weights import DecoderWeights, LayerWeights, Linear
from engine.models.overlap import NOTHING, OFF, PDL_TOKENS, Overlap, default_overlap, plan_ahead
from kernels.ahead import Ahead, rows_ahead

LAYERS = 3


def weights() -> DecoderWeights:
    """Of shapes that tell the weights apart."""

    def linear(features: int) -> Linear:
        return Linear(torch.zeros(features, 64), None)

    def layer(index: int) -> LayerWeights:
        norm = torch.ones(64)
        return LayerWeights(norm, linear(96 + index), linear(64), norm, linear(256), linear(72), None)

    return DecoderWeights(torch.zeros(500, 64), tuple(map(layer, range(LAYERS))), torch.ones(64), torch.zeros(500, 64))


def read(ahead: Ahead | None) -> tuple[Tensor, int]:
    assert ahead is not None
    return ahead.weight, ahead.count * ahead.width


@pytest.mark.parametrize(
    ("overlap", "tokens", "fetches", "dependent"),
    [
        (Overlap(), 1, True, True),
        (Overlap(), 16, True, True),
        (Overlap(), 17, False, True),
        (Overlap(), PDL_TOKENS + 1, False, False),
        (replace(Overlap(), fetch=0), 1, False, True),
        (replace(Overlap(), pdl=False), 1, True, False),
        (OFF, 1, False, False),
    ],
    ids=str,
)
def test_small_steps_overlap(overlap: Overlap, tokens: int, fetches: bool, dependent: bool) -> None:
    assert (overlap.fetches(tokens), overlap.dependent(tokens)) == (fetches, dependent)


def test_each_kernel_fetches_what_the_next_product_reads() -> None:
    given = weights()
    plan = plan_ahead(given, 4096)
    assert len(plan) == LAYERS
    for index, (ahead, layer) in enumerate(zip(plan, given.layers, strict=True)):
        after = given.head if index == LAYERS - 1 else given.layers[index + 1].qkv.weight
        wanted = layer.o.weight, layer.gate_up.weight, layer.down.weight, after
        for part, weight in zip((ahead.o, ahead.gate_up, ahead.down, ahead.qkv), wanted, strict=True):
            found, size = read(part)
            assert found is weight
            assert size == 4096


def test_nothing_is_planned_where_nothing_is_fetched() -> None:
    assert plan_ahead(weights(), 0) == [NOTHING] * LAYERS


def test_no_byte_beyond_the_weight_is_fetched() -> None:
    weight = torch.zeros(10, 300)  # 12,000 bytes
    ahead = rows_ahead(weight, 1 << 20)
    assert 12_000 - 1024 < ahead.count * ahead.width <= 12_000
    assert ahead.stride == ahead.width


def test_the_programs_cover_every_piece() -> None:
    ahead = rows_ahead(torch.zeros(1024, 1024), 1 << 20)
    assert ahead.count == 1024
    assert [ahead.programs(warps) for warps in (1, 5, 8)] == [32, 7, 4]


def test_the_interpreter_overlaps_nothing() -> None:
    assert default_overlap(torch.device("cpu")) == OFF

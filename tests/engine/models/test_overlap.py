"""Which steps overlap what. The GPU tests compare the results."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.models.overlap import OFF, PDL_TOKENS, Overlap, default_overlap
from kernels.launch import PRODUCT_ROWS

LONG = 3 * 64


def weight(inner: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(64, inner, dtype=dtype)


@pytest.mark.parametrize(
    ("overlap", "tokens", "inner", "product", "dependent"),
    [
        (Overlap(), 1, 64, True, True),
        (Overlap(), PRODUCT_ROWS, 64, True, True),
        (Overlap(), PRODUCT_ROWS + 1, 64, False, True),
        (Overlap(), 2 * PRODUCT_ROWS, LONG, True, True),
        (Overlap(), 2 * PRODUCT_ROWS + 1, LONG, False, True),
        (Overlap(), PDL_TOKENS + 1, 64, False, False),
        (replace(Overlap(), products=0), 1, LONG, False, True),
        (replace(Overlap(), pdl=False), 1, 64, True, False),
        (OFF, 1, 64, False, False),
    ],
    ids=str,
)
def test_small_steps_overlap(overlap: Overlap, tokens: int, inner: int, product: bool, dependent: bool) -> None:
    assert (overlap.product(tokens, weight(inner)), overlap.dependent(tokens)) == (product, dependent)


def test_products_of_four_bytes_an_element_are_the_librarys() -> None:
    assert not Overlap().product(1, weight(dtype=torch.float32))


@pytest.mark.parametrize(
    ("capability", "overlap"),
    [((8, 9), OFF), ((9, 0), Overlap()), ((10, 3), Overlap()), ((12, 0), Overlap(products=0))],
    ids=str,
)
def test_a_card_overlaps_what_it_can(
    capability: tuple[int, int], overlap: Overlap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_overlap(torch.device("cuda")) == overlap


def test_the_interpreter_overlaps_nothing() -> None:
    assert default_overlap(torch.device("cpu")) == OFF

"""Which steps overlap what. The GPU tests compare the results."""

from dataclasses import replace

import pytest
import torch

from engine.models.overlap import OFF, PDL_TOKENS, Overlap, default_overlap
from kernels.launch import PRODUCT_ROWS


@pytest.mark.parametrize(
    ("overlap", "tokens", "product", "dependent"),
    [
        (Overlap(), 1, True, True),
        (Overlap(), PRODUCT_ROWS, True, True),
        (Overlap(), PRODUCT_ROWS + 1, False, True),
        (Overlap(), PDL_TOKENS + 1, False, False),
        (replace(Overlap(), products=0), 1, False, True),
        (replace(Overlap(), pdl=False), 1, True, False),
        (OFF, 1, False, False),
    ],
    ids=str,
)
def test_small_steps_overlap(overlap: Overlap, tokens: int, product: bool, dependent: bool) -> None:
    assert (overlap.product(tokens, torch.bfloat16), overlap.dependent(tokens)) == (product, dependent)


def test_products_of_four_bytes_an_element_are_the_librarys() -> None:
    assert not Overlap().product(1, torch.float32)


def test_the_interpreter_overlaps_nothing() -> None:
    assert default_overlap(torch.device("cpu")) == OFF

"""Two-stage searches against the plain ones."""

import pytest
import torch

from engine.worker.search import PART, argmax, inverse_cdf, part_of

WIDTHS = (1, 7, 64, 211, 3 * PART, 640)


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_is_the_first_of_the_largest(width: int) -> None:
    torch.manual_seed(width)
    rows = torch.randint(-5, 5, (40, width)).float()
    assert torch.equal(argmax(rows), rows.argmax(-1))


@pytest.mark.parametrize("width", WIDTHS)
def test_inverse_cdf_matches_one_long_sum(width: int) -> None:
    torch.manual_seed(width)
    weights = torch.rand(50, width) * (torch.rand(50, width) < 0.3)
    weights[:, width // 2] += 0.1
    uniform = torch.rand(50, dtype=torch.float64)
    cumulated = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)[:, 0]
    assert torch.equal(inverse_cdf(weights, uniform), expected)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-48])
@pytest.mark.parametrize("width", [4 * PART, 100])
def test_inverse_cdf_never_finds_a_zero(uniform: float, width: int) -> None:
    """Few weights of very different sizes: whatever is rounded, what is found can be drawn."""
    torch.manual_seed(1)
    weights = torch.zeros(200, width)
    places = torch.randint(width, (200, 5))
    weights.scatter_(1, places, 10.0 ** -torch.randint(0, 30, (200, 5)).float())
    found = inverse_cdf(weights, torch.full((200,), uniform, dtype=torch.float64))
    assert (weights.gather(1, found[:, None]) > 0).all()


def test_rows_of_nan_stay_within_the_row() -> None:
    rows = torch.full((2, 2 * PART), float("nan"))
    assert (inverse_cdf(rows, torch.tensor([0.0, 0.9], dtype=torch.float64)) < 2 * PART).all()
    assert (argmax(rows) < 2 * PART).all()


def test_parts_divide_known_vocabularies() -> None:
    for vocab in (32000, 32768, 49152, 128256, 151936):
        assert vocab % part_of(vocab) == 0
        assert part_of(vocab) <= PART
    assert part_of(50257) == 50257

"""The product of small steps against a dense one: odd sizes, parts that its reader adds up, bias."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels.launch import product_tiles
from kernels.product import product, product_parts
from tests.kernels.build import assert_close


def weight_of(features: int, inner: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(features, inner, device=device).div(inner**0.5).to(dtype)


@pytest.mark.parametrize(
    ("rows", "features", "inner"),
    [(1, 72, 96), (5, 200, 72), (16, 24, 264), (40, 130, 64), (100, 96, 128), (120, 200, 72)],
    ids=str,
)
def test_product(rows: int, features: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inner, device=device).to(dtype), weight_of(features, inner, dtype, device)
    bias = torch.randn(features, device=device).to(dtype)
    for given in (None, bias):
        out = torch.full((rows, features), float("nan"), dtype=dtype, device=device)
        product(out, x, weight, given)
        assert_close(out, x.double() @ weight.double().t() + (0 if given is None else given.double()))


def test_parts_add_up(dtype: torch.dtype, device: torch.device) -> None:
    """A weight of few output features and long rows; its bias is in one part only."""
    torch.manual_seed(6)
    features, inner = (4096, 4096) if device.type == "cuda" else (104, 2048)
    x, weight = torch.randn(9, inner, device=device).to(dtype), weight_of(features, inner, dtype, device)
    assert product_parts(weight) == 2
    bias = torch.randn(features, device=device).to(dtype)
    out = torch.full((2, 9, features), float("nan"), device=device)
    product(out, x, weight, bias, keep=True)
    assert_close(out.sum(0).to(dtype), x.double() @ weight.double().t() + bias.double())
    assert (out[1] - x.double()[:, inner // 2 :] @ weight.double()[:, inner // 2 :].t()).abs().max() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32, 64, 128])
@pytest.mark.parametrize(("features", "inner"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (960, 576)])
@pytest.mark.parametrize("pdl", [False, True])
def test_real_sizes(rows: int, features: int, inner: int, pdl: bool, device: torch.device) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inner, device=device).bfloat16(), weight_of(features, inner, torch.bfloat16, device)
    out = torch.full((product_parts(weight), rows, features), float("nan"), device=device)
    product(out, x, weight, pdl=pdl)
    assert_close(out.sum(0).bfloat16(), x.double() @ weight.double().t())
    flat = torch.full((rows, features), float("nan"), dtype=torch.bfloat16, device=device)
    product(flat, x, weight, pdl=pdl)
    assert_close(flat, x.double() @ weight.double().t())


@pytest.mark.parametrize("rows", [1, 16, 17, 128])
@pytest.mark.parametrize(("features", "inner"), [(6144, 4096), (4096, 14336), (57344, 8192), (576, 1536), (16, 64)])
def test_tiles_hold_every_share(rows: int, features: int, inner: int) -> None:
    for summed, shared in itertools.product((False, True), repeat=2):
        tiles = product_tiles(rows, features, inner, 132, summed=summed, shared=shared)
        assert -(-features // tiles.programs) <= tiles.columns <= 256
        assert tiles.rows >= rows
        assert tiles.stages >= (4 if shared else 2)
        assert (tiles.columns + tiles.rows) * tiles.inner * tiles.stages * 2 <= 227 << 10
        assert tiles.parts == 1 or summed
        assert tiles.tma == (rows == 128)
        assert tiles.columns * tiles.rows <= 128 * 32 * tiles.warps  # sums of a thread


def test_refuses_parts_that_do_not_fit(device: torch.device) -> None:
    x, weight = torch.zeros(2, 64, device=device), torch.zeros(32, 64, device=device)
    with pytest.raises(ValueError, match="parts"):
        product(torch.zeros(3, 2, 32, device=device), x, weight)

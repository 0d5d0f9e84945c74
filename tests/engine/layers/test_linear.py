"""A row of a product has the same bits whatever rows are beside it."""

import pytest
import torch

from engine.layers.linear import PlainProduct, can_pack, cpu_has_bfloat16, make_product

SHAPES = ((960, 576), (576, 1536), (96, 72), (3, 40), (576, 24), (1000, 2048))
COUNTS = (1, 2, 3, 5, 8, 17, 32, 63, 64, 100, 129, 256)
DTYPES = [torch.float32, *([torch.bfloat16] if cpu_has_bfloat16() else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_rows_are_independent(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    if not can_pack(weight):
        pytest.skip("this build does not pack")
    x, addend = torch.randn(300, shape[1]).to(dtype), torch.randn(300, shape[0]).to(dtype)
    product = make_product(weight)
    whole, added = product(x), product(x, addend)
    for count in COUNTS:
        rows = slice(7, 7 + count)
        assert torch.equal(product(x[rows]), whole[rows])
        assert torch.equal(product(x[rows], addend[rows]), added[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_packed_and_plain_agree(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    weight, x, addend = torch.randn(33, 48).to(dtype), torch.randn(9, 48).to(dtype), torch.randn(9, 33).to(dtype)
    offset = torch.randn(33).to(dtype) if bias else None
    packed, plain = make_product(weight, offset), PlainProduct(weight, offset)
    assert packed.out_features == plain.out_features == 33
    torch.testing.assert_close(packed(x), plain(x))
    torch.testing.assert_close(packed(x, addend), plain(x, addend), rtol=0.02, atol=0.05)


@torch.inference_mode()
def test_zero_addend_changes_no_bit() -> None:
    product, x = make_product(torch.randn(40, 64)), torch.randn(5, 64)
    assert torch.equal(product(x, torch.zeros(5, 40)), product(x))

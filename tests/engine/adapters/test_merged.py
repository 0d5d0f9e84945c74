"""Adapters merged into one set give the bits that each gives by itself, wherever its ranks lie in the set."""

import pytest
import torch
from torch import Tensor

from engine.adapters.merged import PieceViews, merge
from engine.layers.linear import REDUCTION_BLOCK, PackedProduct, cpu_has_bfloat16
from engine.layers.lora import DOWN, QKV, StackedLora
from engine.models.dims import ModelDims

DIMS = ModelDims(layers=1, hidden=48, intermediate=64, heads=2, kv_heads=1, head_dim=16, vocab=10)
RANKS = (256, 104, 256, 8, 256, 64, 256, 24, 256)  # of q, k and v alike: together well beyond a block
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not cpu_has_bfloat16(), reason="bf16"))]


class Base:
    """A base product that gives the delta alone."""

    out_features = 64

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        assert addend is not None
        return addend


def views(rank: int, seed: int, dtype: torch.dtype) -> PieceViews:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shapes = {0: (48, 32), 1: (48, 16), 2: (48, 16), 6: (64, 48)}
    return {(0, module): [(random(rank, inn), random(out, rank))] for module, (inn, out) in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_bits_do_not_depend_on_the_set(dtype: torch.dtype, rows: int) -> None:
    adapters = {index: views(rank, index, dtype) for index, rank in enumerate(RANKS)}
    together = merge(DIMS, adapters)
    for site, features in ((QKV, 48), (DOWN, 64)):
        for index in adapters:
            x = torch.randn(rows, features, generator=torch.Generator().manual_seed(index)).to(dtype)
            alone = merge(DIMS, {index: adapters[index]})
            found = [
                StackedLora(s, torch.full((rows,), owner)).product(0, site, Base(), x)
                for s, owner in ((together, index), (alone, 0))
            ]
            assert torch.equal(*found)


def test_columns_between_adapters_are_nobodys() -> None:
    together = merge(DIMS, {index: views(rank, index, torch.float32) for index, rank in enumerate(RANKS)})
    pair = together.pairs[0][QKV]
    assert pair is not None
    owners = pair.owner.tolist()
    assert len(owners) > sum(pair.widths) == 3 * sum(RANKS) > REDUCTION_BLOCK
    for index, rank in enumerate(RANKS):
        places = [place for place, owner in enumerate(owners) if owner == index]
        assert places == list(range(places[0], places[0] + 3 * rank))
        assert places[0] // REDUCTION_BLOCK == places[-1] // REDUCTION_BLOCK
    tokens = StackedLora(together, torch.full((3,), -1)).product(0, QKV, Base(), torch.randn(3, 48))
    assert not tokens.any(), "the base's tokens get an exact zero"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [64, 576, 1024, 1025, 1536, 4096])
def test_rows_of_a_packed_product_are_their_own(dtype: torch.dtype, features: int) -> None:
    weight, x = torch.randn(200, features).to(dtype), torch.randn(70, features).to(dtype)
    product = PackedProduct(weight)
    whole, added = product(x), product(x, x[:, :1].expand(-1, 200).contiguous())
    for count in (1, 2, 3, 7, 16, 64):
        for first in range(0, 70 - count, 9):
            some = x[first : first + count]
            assert torch.equal(product(some), whole[first : first + count])
            addend = some[:, :1].expand(-1, 200).contiguous()
            assert torch.equal(product(some, addend), added[first : first + count])

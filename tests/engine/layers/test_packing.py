"""A packer writes the very bytes that oneDNN writes, and leaves to it what it cannot write."""

import pytest
import torch

from engine.layers import packing
from engine.layers.linear import PackedProduct, can_pack, cpu_has_bfloat16
from engine.layers.packing import Packer, reorder

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not cpu_has_bfloat16(), reason="bf16"))
SHAPES = [(48, 576), (960, 48), (16, 576), (576, 16), (1536, 16), (8, 1536), (3072, 32), (64, 64), (200, 40), (24, 33)]

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this build of torch does not pack")


def raw(packed: torch.Tensor) -> bytes:
    return packing._words(packed).tobytes()


def random(out: int, inn: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Negative zeros and NaN among the numbers: bytes are copied, not numbers."""
    weight = torch.randn(out, inn, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0, 0], weight[-1, -1] = -0.0, float("nan")
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_are_those_of_onednn(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packer = Packer()
    for seed in range(3):
        weight = random(*shape, dtype, seed)
        assert raw(packer.pack(weight)) == raw(reorder(weight))


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="bf16")
def test_shapes_of_adapters_are_written_here(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Packer()
    weights = [random(*shape, torch.bfloat16, seed=1) for shape in SHAPES[:-1]]
    expected = [raw(packer.pack(weight)) for weight in weights]
    monkeypatch.setattr(packing, "reorder", lambda weight: pytest.fail(f"{weight.shape} was given to oneDNN"))
    assert [raw(packer.pack(weight)) for weight in weights] == expected


def test_another_layout_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCKS", (8,))
    weight = random(128, 64, torch.float32, seed=1)
    assert packing._learn(weight) is None
    packer = Packer()
    assert raw(packer.pack(weight)) == raw(reorder(weight))


def test_a_weight_that_is_no_whole_matrix_in_memory() -> None:
    weight = random(64, 128, torch.float32, seed=1)
    packer = Packer()
    for part in (weight.T, weight[:, ::2], weight[3:50]):
        assert raw(packer.pack(part)) == raw(reorder(part)) == raw(packer.pack(part))


def test_packed_weights_are_their_own_and_shapes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_SHAPES", 2)
    packer, x = Packer(), torch.randn(3, 40)
    for count in (16, 32, 48, 16):
        one, other = torch.randn(count, 40), torch.randn(count, 40)
        products = [PackedProduct(weight, None, packer.pack) for weight in (one, other)]
        plain = [PackedProduct(weight) for weight in (one, other)]
        assert all(torch.equal(a(x), b(x)) for a, b in zip(products, plain, strict=True))
    assert len(packer._forms) <= 2

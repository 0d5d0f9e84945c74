"""The products of large steps against the dense reference: runs within tiles, missing modules, bias."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.large_product import Shrunk, gate_up_silu, product_onto
from kernels.lora_gather import lora_gather
from kernels.lora_meta import LARGE_TOKENS, LoraBounds, LoraGroup
from kernels.lora_shrink import lora_shrink
from tests.kernels.build import Adapters, LoraStep, assert_close, make_adapters, make_lora_step
from tests.kernels.test_product import weight_of

LAYER = 1
HIDDEN, INNER = 72, 168
SHAPES = ((HIDDEN, HIDDEN),) * 4 + ((HIDDEN, INNER),) * 2 + ((INNER, HIDDEN),)
GATE_UP, DOWN = LoraGroup(4, HIDDEN, (INNER, INNER)), LoraGroup(6, INNER, (HIDDEN,))
RUNS = [(3, 100), (0, 7), (1, 90), (2, 61)]
CASES = [(300, 16, RUNS), (300, 128, RUNS), (140, 128, [(1, 140)]), (140, 128, [(2, 3)])]


@pytest.fixture(autouse=True)
def two_bytes_on_a_device(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("the tiles are for two bytes an element")


def adapter_ranks() -> Tensor:
    """Four slots: rank 16 everywhere, 8 on up, 40 on down alone, 40 on gate and 24 on up and down."""
    ranks = torch.zeros(4, 2, 7, dtype=torch.int32)
    ranks[0] = 16
    ranks[1, :, 5] = 8
    ranks[2, :, 6] = 40
    ranks[3, :, 4], ranks[3, :, 5:] = 40, 24
    return ranks


def shrunk(x: Tensor, tile: int, runs: list[tuple[int, int]], group: LoraGroup) -> tuple[Shrunk, Adapters, LoraStep]:
    adapters = make_adapters(adapter_ranks(), SHAPES, 3, x.dtype, x.device, 0.2)
    step = make_lora_step(LoraBounds(LARGE_TOKENS, tile, 4, 3), adapters, runs)
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    lora_shrink(x, adapters.arena, step.meta, LAYER, group)
    return Shrunk(adapters.arena, step.meta, LAYER, group), adapters, step


def add_deltas(y: Tensor, x: Tensor, adapters: Adapters, step: LoraStep, group: LoraGroup) -> None:
    for module, part in enumerate(torch.split(y, list(group.features), 1), group.first):
        args = adapters.arena, adapters.pieces, adapters.ranks, step.slots[: len(x)], LAYER, module
        part.copy_(reference.lora_expand(reference.lora_shrink(x.double(), *args), part, *args))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "tile", "runs"), [(5, 16, None), (300, 16, None), *CASES], ids=str)
def test_gate_up_silu(
    rows: int, tile: int, runs: list[tuple[int, int]] | None, bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, HIDDEN, device=device).to(dtype), weight_of(2 * INNER, HIDDEN, dtype, device)
    added = torch.randn(2 * INNER, device=device).to(dtype) if bias else None
    y = x.double() @ weight.double().t() + (0 if added is None else added.double())
    delta = None
    if runs is not None:
        delta, adapters, step = shrunk(x, tile, runs, GATE_UP)
        add_deltas(y, x, adapters, step, GATE_UP)
    out = torch.full((rows + 1, INNER), 7.0, dtype=dtype, device=device)
    gate_up_silu(out[:rows], x, weight, added, delta)
    assert_close(out[:rows], torch.nn.functional.silu(y[:, :INNER]) * y[:, INNER:])
    assert (out[rows] == 7.0).all()


@pytest.mark.parametrize(("rows", "tile", "runs"), CASES, ids=str)
def test_product_onto(
    rows: int, tile: int, runs: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, INNER, device=device).to(dtype), weight_of(HIDDEN, INNER, dtype, device)
    delta, adapters, step = shrunk(x, tile, runs, DOWN)
    residual = torch.randn(rows + 1, HIDDEN, device=device)
    before = residual.double()
    y = x.double() @ weight.double().t()
    add_deltas(y, x, adapters, step, DOWN)
    product_onto(residual[:rows], x, weight, delta)
    assert_close((residual.double() - before)[:rows].to(dtype), y)
    assert torch.equal(residual[rows].double(), before[rows])


def test_refuses_what_does_not_fit(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.zeros(2, 64, dtype=dtype, device=device), torch.zeros(32, 64, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        gate_up_silu(torch.zeros(2, 32, dtype=dtype, device=device), x, weight)
    with pytest.raises(ValueError, match="not float32"):
        product_onto(torch.zeros(2, 32, dtype=torch.float64, device=device), x, weight, None)  # type: ignore[arg-type]

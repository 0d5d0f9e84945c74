"""Norms, rotary with KV store, the store alone and SiLU-and-mul, with and without deltas, at odd sizes."""

import pytest
import torch

from kernels import reference
from kernels.kv_store import store_kv
from kernels.layout import KvLayout
from kernels.norm import add_rms_norm, rms_norm
from kernels.rotary import rotary_store
from kernels.silu_mul import silu_mul
from tests.kernels.build import assert_close

ROWS, LORA = 7, 4


def delta_rows(device: torch.device) -> torch.Tensor:
    return torch.tensor([LORA], dtype=torch.int32, device=device)


def delta_like(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a delta whose rows of the base are poison, the same with zeros there)."""
    delta = torch.randn_like(x)
    clean = delta.clone()
    delta[LORA:], clean[LORA:] = float("nan"), 0.0
    return delta, clean


@pytest.mark.parametrize("size", [64, 100, 4096, 5120])
def test_rms_norm(size: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(size)
    x, weight = torch.randn(ROWS, size, device=device).to(dtype), torch.randn(size, device=device).to(dtype)
    out = torch.full_like(x, float("nan"))
    rms_norm(out, x, weight, 1e-5)
    assert_close(out, reference.rms_norm(x.double(), weight, 1e-5))


@pytest.mark.parametrize("stream", [None, torch.float32], ids=["", "float32 residual"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("size", [100, 2048])
def test_add_rms_norm(
    size: int, lora: bool, stream: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(size)
    residual, y = (torch.randn(ROWS, size, device=device).to(d) for d in (stream or dtype, dtype))
    weight = torch.randn(size, device=device).to(dtype)
    delta, clean = delta_like(y)
    wide = residual.double()
    wanted = reference.add_rms_norm(wide, y.double(), weight, 1e-6, clean.double() if lora else None)
    add_rms_norm(
        y, residual, y, weight, 1e-6,
        delta=delta if lora else None, delta_rows=delta_rows(device) if lora else None, keep=lora,
    )  # fmt: skip
    assert_close(y, wanted)
    assert_close(residual, wide)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("size", [40, 3000])
def test_silu_mul(size: int, lora: bool, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(size)
    gate_up = torch.randn(ROWS, 2 * size, device=device).to(dtype)
    gate_up[0, 0] = -100.0
    delta, clean = delta_like(gate_up)
    out = torch.full((ROWS, size), float("nan"), dtype=dtype, device=device)
    silu_mul(out, gate_up, delta=delta if lora else None, delta_rows=delta_rows(device) if lora else None, keep=lora)
    assert_close(out, reference.silu_mul(gate_up.double(), clean.double() if lora else None))


def test_store_kv(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(8)
    layout = KvLayout(2, 3, 16, 20)
    arena = torch.full((5, layout.elements + 32), 7.0, dtype=dtype, device=device)
    wanted = arena.clone()
    kv = torch.randn(6, 2, 60, device=device).to(dtype)
    locations = torch.tensor([79, 3, -1, 0, 40, -1], dtype=torch.int32, device=device)
    store_kv(kv[:, 0], kv[:, 1], arena, layout, 1, locations)
    heads = kv.view(6, 2, 3, 20)
    reference.store_kv(wanted, layout, 1, heads[:, 0], heads[:, 1], locations)
    assert torch.equal(arena, wanted)
    assert (arena != 7.0).sum() == 4 * 2 * 60


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "delta"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 16), (9, 3, 24), (4, 4, 80)])
def test_rotary_store(
    heads: int, kv_heads: int, head_dim: int, lora: bool, norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(heads)
    layout = KvLayout(2, kv_heads, 16, head_dim)
    arena = torch.full((3, layout.elements + 16), 7.0, dtype=dtype, device=device)
    wanted = arena.double()
    qkv = torch.randn(ROWS, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    delta, clean = delta_like(qkv)
    positions = torch.tensor([0, 5, 99, 31, 2, 2, 0], dtype=torch.int32, device=device)
    locations = torch.tensor([0, 47, 17, -1, 30, 31, -1], dtype=torch.int32, device=device)
    table = torch.randn(100, head_dim, device=device)
    weights = [torch.randn(head_dim, device=device).to(dtype) for _ in range(2)]

    total = (qkv.double() + clean.double() if lora else qkv.double()).view(ROWS, -1, head_dim)
    q, k, v = torch.split(total, [heads, kv_heads, kv_heads], 1)
    if norm:
        q, k = (reference.rms_norm(t, w, 1e-6) for t, w in zip((q, k), weights, strict=True))
    q, k = (reference.rotary(t, positions, table) for t in (q, k))
    reference.store_kv(wanted, layout, 1, k, v, locations)

    out = torch.full((ROWS, heads * head_dim), float("nan"), dtype=dtype, device=device)
    rotary_store(
        out,
        qkv,
        arena,
        layout,
        1,
        positions,
        locations,
        table,
        delta=delta if lora else None,
        delta_rows=delta_rows(device) if lora else None,
        norms=(weights[0], weights[1], 1e-6) if norm else None,
    )
    assert_close(out, q.flatten(1))
    assert_close(arena, wanted)
    assert torch.equal(arena == 7.0, wanted == 7.0)


def test_rotary_in_place(device: torch.device) -> None:
    torch.manual_seed(9)
    layout = KvLayout(2, 1, 16, 16)
    arena = torch.zeros(1, layout.elements, device=device)
    qkv = torch.randn(3, 5 * 16, device=device)
    places = torch.arange(3, dtype=torch.int32, device=device)
    table = torch.randn(3, 16, device=device)
    wanted = reference.rotary(qkv[:, :48].reshape(3, 3, 16), places, table)
    rotary_store(qkv[:, :48], qkv, arena, layout, 1, places, places, table)
    assert_close(qkv[:, :48], wanted.flatten(1))


def test_a_delta_needs_the_number_of_its_rows(device: torch.device) -> None:
    x = torch.zeros(1, 8, device=device)
    with pytest.raises(ValueError, match="number of its rows"):
        silu_mul(x[:, :4], x, delta=x)

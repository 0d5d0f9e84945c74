"""Shrink and expand against the dense reference: merged modules, real ranks, missing modules, stale tails."""

from dataclasses import replace

import pytest
import torch

from kernels import reference
from kernels.launch import shrink_tiles
from kernels.lora_expand import lora_expand
from kernels.lora_gather import lora_gather
from kernels.lora_meta import LoraBounds, LoraGroup
from kernels.lora_shrink import lora_shrink
from tests.kernels.build import (
    Adapters,
    LoraStep,
    assert_close,
    lora_fields,
    make_adapters,
    make_lora_step,
    pack_lora_step,
)

HIDDEN, QUERY, KEY, INNER = 72, 80, 24, 136
SHAPES = (
    (HIDDEN, QUERY),
    (HIDDEN, KEY),
    (HIDDEN, KEY),
    (QUERY, HIDDEN),
    (HIDDEN, INNER),
    (HIDDEN, INNER),
    (INNER, HIDDEN),
)
GROUPS = {
    "qkv": LoraGroup(0, HIDDEN, (QUERY, KEY, KEY)),
    "o": LoraGroup(3, QUERY, (HIDDEN,)),
    "gate_up": LoraGroup(4, HIDDEN, (INNER, INNER)),
    "down": LoraGroup(6, INNER, (HIDDEN,)),
}
LAYERS, LAYER = 2, 1


def mixed_ranks() -> torch.Tensor:
    """Five slots: rank 16 everywhere, 8 on q and v, 40 on down alone, by layer and module, 104 everywhere."""
    ranks = torch.zeros(5, LAYERS, 7, dtype=torch.int32)
    ranks[0] = 16
    ranks[1, :, [0, 2]] = 8
    ranks[2, :, 6] = 40
    ranks[3] = torch.tensor([[8, 16, 24, 0, 32, 8, 16], [16, 24, 8, 48, 0, 16, 8]])
    ranks[4] = 104
    return ranks


def run(
    adapters: Adapters, step: LoraStep, x: torch.Tensor, y: torch.Tensor, group: LoraGroup, *, add: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernels left in y, what the reference leaves)."""
    wanted = y.double() if add else torch.where((step.slots >= 0)[:, None], 0.0, y.double())
    for module, part in enumerate(torch.split(wanted, list(group.features), 1), group.first):
        args = (adapters.arena, adapters.pieces, adapters.ranks, step.slots, LAYER, module)
        part.copy_(reference.lora_expand(reference.lora_shrink(x.double(), *args), part, *args))
    lora_shrink(x, adapters.arena, step.meta, LAYER, group)
    lora_expand(y, adapters.arena, step.meta, LAYER, group, add=add)
    return y, wanted


BATCHES = ([(3, 5), (0, 1), (4, 18), (1, 2), (2, 3)], [(2, 1)], [(4, 40)])


@pytest.mark.parametrize(
    ("merged", "tile", "groups"),
    [(merged, 16, batch) for merged in GROUPS for batch in BATCHES[:2]]
    + [("qkv", 8, BATCHES[0]), ("gate_up", 8, BATCHES[1]), ("o", 8, BATCHES[2]), ("o", 16, BATCHES[2])]
    + [("qkv", 64, BATCHES[0]), ("gate_up", 64, BATCHES[2]), ("down", 64, BATCHES[0])],
    ids=str,
)
def test_delta(merged: str, tile: int, groups: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(1)
    adapters = make_adapters(mixed_ranks(), SHAPES, 7, dtype, device, 0.2)
    step = make_lora_step(LoraBounds(43, tile, 5, 7), adapters, groups)
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    x = torch.randn(43, GROUPS[merged].inner, device=device).to(dtype)
    y = torch.full((43, sum(GROUPS[merged].features)), 7.0, dtype=dtype, device=device)
    y[: step.rows] = float("nan")
    out, wanted = run(adapters, step, x, y, GROUPS[merged], add=False)
    rows = int(step.meta.rows(GROUPS[merged]))
    assert_close(out[:rows], wanted[:rows])
    assert out[rows : step.rows].isnan().all()
    assert (out[step.rows :] == 7.0).all()
    assert not wanted[rows : step.rows].any()


@pytest.mark.parametrize(
    ("tile", "merged", "parts"),
    [
        pytest.param(8, "qkv", 4, marks=pytest.mark.slow),
        pytest.param(16, "qkv", 4, marks=pytest.mark.slow),
        (16, "down", 8),
        (64, "qkv", 1),
        (64, "down", 1),
    ],
)
def test_long_inputs_in_parts(tile: int, merged: str, parts: int, dtype: torch.dtype, device: torch.device) -> None:
    """Whose length is no multiple of a tile's."""
    torch.manual_seed(7)
    group = replace(GROUPS[merged], inner=2056)
    bounds = LoraBounds(43, tile, 5, 7)
    assert shrink_tiles(bounds, group, dtype.itemsize).splits == parts
    members = range(group.first, group.first + len(group.features))
    shapes = tuple((2056 if i in members else inner, out) for i, (inner, out) in enumerate(SHAPES))
    adapters = make_adapters(mixed_ranks(), shapes, 7, dtype, device, 0.05)
    step = make_lora_step(bounds, adapters, BATCHES[0])
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    x = torch.randn(43, 2056, device=device).to(dtype)
    y = torch.zeros(43, sum(group.features), dtype=dtype, device=device)
    out, wanted = run(adapters, step, x, y, group, add=False)
    assert_close(out, wanted)


@pytest.mark.parametrize("merged", ["gate_up", "down"])
def test_rank_blocks_together_or_one_by_one(
    merged: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card the same bits; the interpreter's products add up in an order of their own for each shape."""
    torch.manual_seed(3)
    adapters = make_adapters(mixed_ranks(), SHAPES, 7, dtype, device, 0.2)
    step = make_lora_step(LoraBounds(43, 64, 5, 7), adapters, BATCHES[0])
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    x = torch.randn(43, GROUPS[merged].inner, device=device).to(dtype)
    assert shrink_tiles(step.meta.bounds, GROUPS[merged], dtype.itemsize).blocks > 1
    made = []
    for tiles in (shrink_tiles, lambda *given: replace(shrink_tiles(*given), blocks=1)):
        monkeypatch.setattr("kernels.lora_shrink.shrink_tiles", tiles)
        step.meta.z.fill_(7.0)
        lora_shrink(x, adapters.arena, step.meta, LAYER, GROUPS[merged])
        made.append(step.meta.z.clone())
    bound = 0.0 if device.type == "cuda" else 1e-5
    torch.testing.assert_close(*made, rtol=bound, atol=bound)
    assert (made[0] != 7.0).any()


@pytest.mark.parametrize("merged", ["qkv", "down"])
@pytest.mark.parametrize("exact", [False, True])
def test_added_to_the_base_product(merged: str, exact: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Or, in float32, to the residual stream."""
    torch.manual_seed(2)
    adapters = make_adapters(mixed_ranks(), SHAPES, 7, dtype, device, 0.2)
    step = make_lora_step(LoraBounds(40, 16, 5, 7), adapters, BATCHES[0])
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    x = torch.randn(40, GROUPS[merged].inner, device=device).to(dtype)
    width = sum(GROUPS[merged].features)
    wider = torch.randn(40, width + 8, device=device).to(torch.float32 if exact else dtype)
    y = wider[:, :width]
    out, wanted = run(adapters, step, x, y, GROUPS[merged], add=True)
    assert_close(out.to(dtype), wanted)


@pytest.mark.parametrize("merged", ["qkv", "down"])
def test_more_tokens_where_every_rank_is_small(merged: str, dtype: torch.dtype, device: torch.device) -> None:
    """The expand of larger steps has no loop over rank blocks then."""
    torch.manual_seed(5)
    ranks = torch.tensor([16, 8, 0, 16], dtype=torch.int32)[:, None, None].expand(4, LAYERS, 7).contiguous()
    adapters = make_adapters(ranks, SHAPES, 1, dtype, device, 0.2)
    step = make_lora_step(LoraBounds(150, 16, 4, 1), adapters, [(1, 70), (3, 1), (0, 18), (2, 3)])
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    x = torch.randn(150, GROUPS[merged].inner, device=device).to(dtype)
    y = torch.zeros(150, sum(GROUPS[merged].features), dtype=dtype, device=device)
    out, wanted = run(adapters, step, x, y, GROUPS[merged], add=False)
    assert_close(out, wanted)


@pytest.mark.parametrize("rank", [8, 64, 256])
def test_ranks(rank: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(rank)
    ranks = torch.full((1, LAYERS, 7), rank, dtype=torch.int32)
    adapters = make_adapters(ranks, SHAPES, 16, dtype, device, 0.2)
    step = make_lora_step(LoraBounds(4, 16, 8, 16), adapters, [(0, 3)])
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    x = torch.randn(4, HIDDEN, device=device).to(dtype)
    y = torch.full((4, 2 * INNER), float("nan"), dtype=dtype, device=device)
    out, wanted = run(adapters, step, x, y, GROUPS["gate_up"], add=False)
    assert_close(out[:3], wanted[:3])


def test_next_step_in_the_same_bucket_meets_no_stale_tail(device: torch.device) -> None:
    torch.manual_seed(3)
    adapters = make_adapters(mixed_ranks(), SHAPES, 7, torch.float32, device, 0.2)
    bounds = LoraBounds(43, 16, 5, 7)
    step = make_lora_step(bounds, adapters, BATCHES[0])
    x = torch.randn(43, HIDDEN, device=device)
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    lora_shrink(x, adapters.arena, step.meta, LAYER, GROUPS["qkv"])
    # The step after: fewer rows, other slots, over the same device arrays.
    after = make_lora_step(bounds, adapters, [(1, 2), (3, 1)])
    step.meta.counts.copy_(after.meta.counts)
    step.meta.items.copy_(after.meta.items)
    step.meta.work.copy_(after.meta.work)
    lora_gather(step.meta, adapters.pieces, adapters.ranks)
    y = torch.full((43, QUERY + 2 * KEY), 7.0, device=device)
    out, wanted = run(adapters, LoraStep(step.meta, after.slots, after.rows), x, y, GROUPS["qkv"], add=False)
    assert_close(out, wanted)


def test_same_bits_in_another_slot_and_beside_others(device: torch.device) -> None:
    """Same rows and group size: bit-equal, whoever shares the batch and whichever slot holds the adapter."""
    torch.manual_seed(4)
    ranks = torch.full((4, LAYERS, 7), 24, dtype=torch.int32)
    adapters = make_adapters(ranks, SHAPES, 2, torch.float32, device, 0.2)
    adapters.pieces[3] = adapters.pieces[0]
    bounds = LoraBounds(32, 16, 4, 2)
    x = torch.randn(32, HIDDEN, device=device)
    outs = []
    for groups in ([(0, 7)], [(3, 7), (1, 12), (2, 4)]):
        step = make_lora_step(bounds, adapters, groups)
        lora_gather(step.meta, adapters.pieces, adapters.ranks)
        y = torch.zeros(32, QUERY + 2 * KEY, device=device)
        lora_shrink(x, adapters.arena, step.meta, LAYER, GROUPS["qkv"])
        lora_expand(y, adapters.arena, step.meta, LAYER, GROUPS["qkv"], add=False)
        outs.append(y[:7])
    assert torch.equal(*outs)
    assert outs[0].abs().sum() > 0


def test_refuses_a_table_of_other_rank_blocks(device: torch.device) -> None:
    adapters = make_adapters(mixed_ranks(), SHAPES, 7, torch.float32, device)
    step = make_lora_step(LoraBounds(4, 16, 5, 7), adapters, [(0, 1)])
    with pytest.raises(ValueError, match="rank blocks"):
        lora_gather(step.meta, adapters.pieces[..., :3].contiguous(), adapters.ranks)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_metadata(device: torch.device) -> None:
    torch.manual_seed(5)
    adapters = make_adapters(mixed_ranks(), SHAPES, 7, torch.bfloat16, device, 0.2)
    bounds = LoraBounds(43, 16, 5, 7)
    step = make_lora_step(bounds, adapters, BATCHES[0])
    x = torch.randn(43, HIDDEN, device=device).bfloat16()
    y = torch.zeros(43, QUERY + 2 * KEY, device=device).bfloat16()

    def launch() -> None:
        lora_gather(step.meta, adapters.pieces, adapters.ranks)
        lora_shrink(x, adapters.arena, step.meta, LAYER, GROUPS["qkv"])
        lora_expand(y, adapters.arena, step.meta, LAYER, GROUPS["qkv"], add=False)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    packed = lora_fields(bounds).split(pack_lora_step(bounds, adapters, [(2, 3), (4, 20)]).to(device))
    step.meta.counts.copy_(packed["counts"])
    step.meta.items.copy_(packed["lora_items"])
    step.meta.work.copy_(packed["lora_work"])
    y.fill_(7.0)
    graph.replay()
    after = make_lora_step(bounds, adapters, [(2, 3), (4, 20)])
    fresh = torch.full_like(y, 7.0)
    lora_gather(after.meta, adapters.pieces, adapters.ranks)
    fresh, wanted = run(adapters, after, x, fresh, GROUPS["qkv"], add=False)
    assert torch.equal(y, fresh)
    assert_close(y, wanted)

"""Blocks and pieces beyond 2^32 elements of the arena: every address is taken in 64 bits."""

from dataclasses import replace

import pytest
import torch

from kernels.attention_decode import decode_attention
from kernels.attention_meta import AttentionBounds
from kernels.attention_prefill import prefill_attention
from kernels.launch import q_tile
from kernels.layout import PIECE_UNIT, KvLayout
from kernels.lora_expand import lora_expand
from kernels.lora_gather import lora_gather
from kernels.lora_meta import LoraBounds, LoraGroup
from kernels.lora_shrink import lora_shrink
from kernels.rotary import rotary_store
from tests.kernels.build import KvStep, make_adapters, make_kv_step, make_lora_step

pytestmark = pytest.mark.gpu
FAR = 2**32 + 2**31  # elements


def test_attention_and_store_at_the_top() -> None:
    torch.manual_seed(10)
    device, layout = torch.device("cuda"), KvLayout(2, 2, 16, 64)
    bounds = AttentionBounds(41, 2, q_tile(8, 2, 64, 2), 3, 1024)
    near = make_kv_step(layout, [600, 100], [1, 40], bounds, 8, torch.bfloat16, device)
    chunks, chunk = near.arena.shape
    shift = FAR // chunk
    arena = torch.empty(shift + chunks, chunk, dtype=torch.bfloat16, device=device)
    arena[shift:] = near.arena
    tables = near.tables + shift
    far = replace(near, arena=arena, tables=tables, meta=replace(near.meta, block_tables=tables))
    qkv = torch.randn(41, 12 * 64, device=device).bfloat16()
    outs = [_store_and_attend(step, qkv, moved) for step, moved in ((near, 0), (far, shift))]
    assert torch.equal(*outs)
    assert torch.equal(near.arena.nan_to_num(7.0), arena[shift:].nan_to_num(7.0))


def _store_and_attend(step: KvStep, qkv: torch.Tensor, shift: int) -> torch.Tensor:
    layout, table = step.layout, torch.linspace(-1, 1, 4096, device=qkv.device).view(64, 64)
    blocks = step.token_tables.gather(1, (step.positions // 16)[:, None])[:, 0] + shift
    locations = (blocks * 16 + step.positions % 16).int()
    q, out = torch.empty_like(qkv[:, :512]), torch.empty_like(qkv[:, :512])
    positions = (step.positions % 64).int()
    rotary_store(q, qkv, step.arena, layout, 1, positions, locations, table)
    prefill_attention(out, q, step.arena, layout, 1, step.meta, 0.125)
    decode_attention(out, q, step.arena, layout, 1, step.meta, 0.125)
    return out


def test_adapters_at_the_top() -> None:
    torch.manual_seed(11)
    device, group = torch.device("cuda"), LoraGroup(4, 256, (320, 320))
    shapes = ((256, 256),) * 4 + ((256, 320),) * 2 + ((320, 256),)
    near = make_adapters(torch.full((2, 1, 7), 24, dtype=torch.int32), shapes, 2, torch.bfloat16, device)
    arena = torch.empty(FAR + near.arena.numel(), dtype=torch.bfloat16, device=device)
    arena[FAR:] = near.arena[0]
    far = replace(near, arena=arena.view(1, -1), pieces=near.pieces + FAR * 2 // PIECE_UNIT)
    x, outs = torch.randn(9, 256, device=device).bfloat16(), []
    for adapters in (near, far):
        step = make_lora_step(LoraBounds(9, 16, 2, 2), adapters, [(1, 4), (0, 5)])
        y = torch.zeros(9, 640, dtype=torch.bfloat16, device=device)
        lora_gather(step.meta, adapters.pieces, adapters.ranks)
        lora_shrink(x, adapters.arena, step.meta, 0, group)
        lora_expand(y, adapters.arena, step.meta, 0, group, add=False)
        outs.append(y)
    assert torch.equal(*outs)
    assert outs[0].abs().sum() > 0

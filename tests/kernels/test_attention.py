"""Paged prefill and decode against the reference, in batches that mix both; what no token filled is NaN."""

import pytest
import torch

from kernels import attention_decode, reference
from kernels.attention_decode import decode_attention
from kernels.attention_meta import AttentionBounds
from kernels.attention_prefill import prefill_attention
from kernels.launch import multiprocessors, q_tile
from kernels.layout import KvLayout
from tests.kernels.build import KvStep, assert_close, make_kv_step

LAYER = 1


def attend(step: KvStep, q: torch.Tensor, window: int = 0, *, long: bool = False) -> torch.Tensor:
    """What both kernels leave in a buffer of sevens."""
    out = torch.full_like(q, 7.0).flatten(1)
    scale = step.layout.head_dim**-0.5
    args = (out, q.flatten(1), step.arena, step.layout, LAYER, step.meta, scale)
    if step.meta.bounds.q_tile:
        prefill_attention(*args, window, long=long)
    decode_attention(*args)
    return out.view(q.shape)


def expected(step: KvStep, q: torch.Tensor, window: int = 0) -> torch.Tensor:
    layout = step.layout
    shape = (layout.layers, layout.kv_heads, layout.block_tokens, layout.head_dim)
    return reference.attention(q.double(), step.arena, step.token_tables, step.positions, LAYER, shape, window)


def check(
    layout: KvLayout,
    heads: int,
    contexts: list[int],
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
    window: int = 0,
    splits: int = 3,
) -> None:
    torch.manual_seed(sum(contexts) + heads)
    size = torch.empty((), dtype=dtype).element_size()
    tile = q_tile(heads, layout.kv_heads, layout.head_dim, size)
    bounds = AttentionBounds(sum(lengths) + 2, len(lengths) + 1, tile, splits, 4096)
    step = make_kv_step(layout, contexts, lengths, bounds, heads, dtype, device, window)
    q = torch.randn(sum(lengths) + 2, heads, layout.head_dim, device=device).to(dtype)
    rows = sum(lengths)
    wanted = expected(step, q[:rows], window)
    for long in {False, size < 4 and tile > 0}:  # other tiles; in float32 they are the same
        out = attend(step, q, window, long=long)
        assert_close(out[:rows], wanted)
        assert (out[rows:] == 7.0).all()


MIXED = ([1, 37, 300, 5, 19, 70], [1, 1, 1, 5, 2, 33])  # contexts, new tokens: decodes, a prefix, a later chunk


@pytest.mark.parametrize("head_dim", [20, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(KvLayout(2, 1, 16, head_dim), 2, [150, 40], [1, 9], dtype, device)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 16), (4, 1, 16), (9, 3, 16), (14, 2, 16), (12, 1, 16), (32, 1, 128)]
)
def test_groups(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(KvLayout(2, kv_heads, 16, head_dim), heads, *MIXED, dtype, device)


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("window", [0, 1, 24, 1000])
def test_windows(block_tokens: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
    check(KvLayout(2, 1, block_tokens, 16), 3, *MIXED, dtype, device, window)


def test_more_items_than_programs(dtype: torch.dtype, device: torch.device) -> None:
    """A bucket of one split a sequence still takes contexts that are cut into several parts."""
    check(KvLayout(2, 1, 16, 16), 2, [2100, 4096], [1, 1], dtype, device, splits=1)


def test_a_long_split_decode(dtype: torch.dtype, device: torch.device) -> None:
    check(KvLayout(2, 1, 16, 16), 2, [1300, 3], [1, 1], dtype, device, splits=10)


def test_a_bucket_of_decodes_alone(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(6)
    layout, lengths = KvLayout(2, 2, 16, 32), [1, 1]
    step = make_kv_step(layout, [200, 9], lengths, AttentionBounds(2, 2, 0, 2, 512), 4, dtype, device)
    q = torch.randn(2, 4, 32, device=device).to(dtype)
    assert_close(attend(step, q), expected(step, q))


@pytest.mark.parametrize("each", [1, 3, 5, 7])
def test_many_decodes(each: int, dtype: torch.dtype, device: torch.device) -> None:
    """So many programs a multiprocessor, whose tiles differ; overlapping launches, and kept results, are the same."""
    torch.manual_seed(each)
    layout, count = KvLayout(2, 8, 16, 128), max(1, each * multiprocessors(device) // 8)
    contexts = [1 + 37 * i % 90 for i in range(count)]
    step = make_kv_step(layout, contexts, [1] * count, AttentionBounds(count, count, 0, 1, 512), 16, dtype, device)
    q = torch.randn(count, 16, 128, device=device).to(dtype)
    out = attend(step, q)
    assert_close(out, expected(step, q))
    again, pdl = torch.zeros_like(out).flatten(1), device.type == "cuda"
    decode_attention(again, q.flatten(1), step.arena, layout, LAYER, step.meta, 128**-0.5, pdl=pdl, keep=True)
    assert torch.equal(again, out.flatten(1))


def test_same_bits_whoever_shares_the_batch(device: torch.device) -> None:
    layout, outs = KvLayout(2, 1, 16, 16), []
    for others in ([5, 900], [400, 33]):
        torch.manual_seed(7)
        bounds = AttentionBounds(3, 3, 0, 4, 4096)
        step = make_kv_step(layout, [700, *others], [1, 1, 1], bounds, 2, torch.float32, device)
        own = torch.linspace(-1, 1, 700 * 2 * 16, device=device).sin().view(700, 2, 1, 16)
        chunks = step.tables[int(step.table_rows[0]), :44].long()
        places = chunks.repeat_interleave(16)[:700] * 16 + torch.arange(700, device=device) % 16
        reference.store_kv(step.arena, layout, LAYER, own[:, 0], own[:, 1], places)
        q = torch.linspace(0, 3, 3 * 2 * 16, device=device).cos().view(3, 2, 16)
        outs.append(attend(step, q)[0])
    assert torch.equal(*outs)


def test_refuses_items_of_another_tile(device: torch.device) -> None:
    layout = KvLayout(2, 1, 16, 16)
    step = make_kv_step(layout, [8], [4], AttentionBounds(4, 1, 5, 1, 512), 2, torch.float32, device)
    with pytest.raises(ValueError, match="packed for 5 tokens"):
        attend(step, torch.randn(4, 2, 16, device=device))


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_without_tma(
    block_tokens: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices that cannot copy tiles whole; heads of size 20 cannot be anywhere but in float32."""
    monkeypatch.setattr(attention_decode, "has_tma", lambda _: False)
    check(KvLayout(2, 2, block_tokens, 32), 6, *MIXED, dtype, device, window=24)


def test_refuses_blocks_that_hold_no_whole_tiles(device: torch.device) -> None:
    layout = KvLayout(1, 1, 24, 16)
    step = make_kv_step(layout, [8], [1], AttentionBounds(1, 1, 0, 1, 512), 2, torch.float32, device)
    q = torch.zeros(1, 32, device=device)
    with pytest.raises(ValueError, match="blocks of 24 tokens"):
        decode_attention(torch.empty_like(q), q, step.arena, layout, 0, step.meta, 1.0)

"""Attention on torch against the plain reference; gathered and mirrored alike; masked memory never counts."""

import random
from dataclasses import dataclass, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.geometry import make_geometry
from engine.layers import mirror
from engine.layers.attention import TorchAttention, bucket
from engine.layers.device_rotary import rotary_table
from engine.layers.linear import cpu_has_bfloat16
from engine.layers.rotary import Rotary
from engine.models.config import RopeConfig
from engine.models.dims import ModelDims
from engine.worker.batch import Batch, Span
from kernels.reference import attention as reference
from kernels.reference import rotary as turned

POSITIONS = 640
DIMS = ModelDims(layers=2, hidden=72, intermediate=104, heads=6, kv_heads=2, head_dim=20, vocab=50)
MIRRORED = 1 << 26


@dataclass
class Sequence:
    row: int
    sequence_id: int
    blocks: list[int]
    length: int = 0


class Bench:
    """Sequences that grow in an arena full of NaN."""

    def __init__(self, dtype: torch.dtype, mirror_bytes: int, dims: ModelDims = DIMS, early: int = 16) -> None:
        self.dims, self.geometry = dims, make_geometry(dims, dtype.itemsize)
        self.block = self.geometry.block_tokens
        self.arena = torch.full((400, self.geometry.chunk_elements), float("nan"), dtype=dtype)
        rotary = Rotary(RopeConfig(), dims.head_dim, POSITIONS, dtype, self.arena.device)
        self.attention = TorchAttention(self.arena, dims, self.block, rotary, mirror_bytes=mirror_bytes, early=early)
        self.table = np.zeros((40, 40), np.int64)
        self.random = random.Random(5)
        self.free = self.random.sample(range(400), 400)
        self.count = 0

    def new(self) -> Sequence:
        self.count += 1
        return Sequence(self.count % 40, self.count, [])

    def step(self, parts: list[tuple[Sequence, int]]) -> list[tuple[Tensor, Tensor]]:
        """Adds tokens to sequences; for each layer what attention gave and what the reference gives."""
        found, inputs, positions, rows = self.attend(parts)
        return [
            (f, self._expected(i, qkv, positions, rows)) for i, (f, qkv) in enumerate(zip(found, inputs, strict=True))
        ]

    def attend(self, parts: list[tuple[Sequence, int]]) -> tuple[list[Tensor], list[Tensor], Tensor, np.ndarray]:
        """Adds tokens to sequences; by layer what attention gave and was given, then positions and rows."""
        spans, fresh, first = [], [], 0
        for sequence, length in parts:
            spans.append(Span(sequence.sequence_id, sequence.row, first, length, sequence.length))
            first, sequence.length = first + length, sequence.length + length
            while len(sequence.blocks) * self.block < sequence.length:
                sequence.blocks.append(self.free.pop())
                fresh.append(sequence.blocks[-1])
            self.table[sequence.row, : len(sequence.blocks)] = sequence.blocks
        positions = torch.cat([torch.arange(s.start, s.context) for s in spans])
        rows = np.repeat([s.row for s in spans], [s.length for s in spans])
        self.attention.begin(Batch(positions, positions, rows, tuple(spans), (), self.table, tuple(fresh)))
        inputs = [self._qkv(layer, positions) for layer in range(self.dims.layers)]
        found = [self.attention(layer, qkv) for layer, qkv in enumerate(inputs)]
        self.attention.finish()
        return found, inputs, positions, rows

    def _qkv(self, layer: int, positions: Tensor) -> Tensor:
        dims, seed = self.dims, torch.Generator().manual_seed(int(positions.sum()) + layer)
        qkv = torch.randn(len(positions), (dims.heads + 2 * dims.kv_heads) * dims.head_dim, generator=seed)
        return qkv.to(self.arena.dtype)

    def _expected(self, layer: int, qkv: Tensor, positions: Tensor, rows: np.ndarray) -> Tensor:
        """What the plain reference reads in the arena, once the step is over."""
        dims = self.dims
        shape = (dims.layers, dims.kv_heads, self.block, dims.head_dim)
        table_of_turns = rotary_table(RopeConfig(), dims.head_dim, POSITIONS, qkv.device)
        q = turned(qkv.view(len(rows), -1, dims.head_dim)[:, : dims.heads], positions, table_of_turns)
        table = torch.from_numpy(self.table[rows])
        return reference(q, self.arena, table, positions, layer, shape).reshape(len(rows), -1)


def walk(bench: Bench) -> list[tuple[Tensor, Tensor]]:
    """Prompts in chunks, decodes, sequences that come, pause and go, lanes that are outgrown."""
    a, b, c = bench.new(), bench.new(), bench.new()
    told = bench.step([(a, 5), (b, 70)])
    told += bench.step([(a, 1), (b, 1), (c, 150)])
    for turn in range(4):
        told += bench.step([(c, 1), (a, 1), (b, 1)] if turn % 2 else [(a, 1), (b, 1), (c, 1)])
    told += bench.step([(b, 1), (c, 1)])  # a pauses
    told += bench.step([(a, 1), (c, 1), (b, 30)])
    d = bench.new()
    told += bench.step([(d, 63), (a, 1)])
    for _ in range(4):  # d outgrows its lane
        told += bench.step([(d, 1), (a, 1), (c, 1)])
    return told


@pytest.mark.parametrize("mirror_bytes", [0, 200_000, MIRRORED])
@torch.inference_mode()
def test_matches_reference(mirror_bytes: int) -> None:
    for found, expected in walk(Bench(torch.float32, mirror_bytes)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (8, 1), (9, 3)])
@torch.inference_mode()
def test_groups(heads: tuple[int, int]) -> None:
    dims = replace(DIMS, heads=heads[0], kv_heads=heads[1], head_dim=8)
    for found, expected in walk(Bench(torch.float32, MIRRORED, dims)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="the CPU does not multiply bfloat16 natively")
@torch.inference_mode()
def test_mirrored_equals_gathered_to_the_bit() -> None:
    gathered, mirrored = (walk(Bench(torch.bfloat16, size)) for size in (0, MIRRORED))
    assert all(torch.equal(g, m) for (g, _), (m, _) in zip(gathered, mirrored, strict=True))


def grow(bench: Bench, count: int, steps: int) -> tuple[list[Tensor], list[int]]:
    """Sequences that begin together: what attention gave, and how many came to a lane in each step."""
    sequences, found, came = [bench.new() for _ in range(count)], list[Tensor](), list[int]()
    for sequence in sequences:
        bench.attend([(sequence, bench.block * 8 - 20)])
    before = set[tuple[int, int]]()
    for _ in range(steps):
        found += bench.attend([(sequence, 1) for sequence in sequences])[0]
        holds = bench.attention._mirror.holds
        held = {(blocks, s.sequence_id) for blocks in (8, 16) for s in sequences if holds(blocks, s.sequence_id)}
        came.append(len(held - before))
        before = held
    return found, came


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="the CPU does not multiply bfloat16 natively")
@pytest.mark.parametrize(("count", "most"), [(1, 1), (9, 1), (20, 2)])
@torch.inference_mode()
def test_who_began_together_moves_one_after_the_other_to_the_same_bits(count: int, most: int) -> None:
    (early, came), (late, jumped), (gathered, _) = (
        grow(Bench(torch.bfloat16, size, early=steps), count, 30)
        for size, steps in ((MIRRORED, 16), (MIRRORED, 0), (0, 0))
    )
    assert came[0] == count
    assert max(came[1:]) == most
    assert sum(came) == 2 * count
    assert max(jumped[1:]) == count
    assert all(torch.equal(e, g) and torch.equal(e, g_) for e, g, g_ in zip(early, late, gathered, strict=True))


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="the CPU does not multiply bfloat16 natively")
@pytest.mark.parametrize("mirror_bytes", [450_000, 900_000])
@torch.inference_mode()
def test_in_little_memory_several_lanes_give_the_same_bits(mirror_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SMALL", 0)
    bench = Bench(torch.bfloat16, mirror_bytes)
    makes = Mock(wraps=bench.attention._mirror._another)
    monkeypatch.setattr(bench.attention._mirror, "_another", makes)
    (found, _), (gathered, _) = grow(bench, 9, 30), grow(Bench(torch.bfloat16, 0), 9, 30)
    assert makes.call_count > 3
    assert all(torch.equal(f, g) for f, g in zip(found, gathered, strict=True))


@torch.inference_mode()
def test_what_was_in_a_lane_before_never_counts() -> None:
    """A sequence of NaN leaves its place to another, which sees none of it."""
    bench = Bench(torch.float32, MIRRORED)
    sick, well = bench.new(), bench.new()
    bench.step([(sick, 40)])
    bench.arena[sick.blocks[0]] = float("nan")
    bench.step([(sick, 1)])
    bench.step([(well, 20)])
    for found, expected in bench.step([(well, 1)]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_buckets_hold_their_contexts() -> None:
    for blocks in range(1, 2000):
        assert blocks <= bucket(blocks) <= max(blocks + 7, blocks * 1.25)
    assert len({bucket(blocks) for blocks in range(1, 513)}) < 25

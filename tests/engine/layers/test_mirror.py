"""Lanes of the mirror as sequences grow: within the limit, in touched memory, and who is in one stays there."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.layers import mirror
from engine.layers.attention import bucket
from engine.layers.mirror import KvMirror, Lane, LaneGroup
from engine.models.dims import ModelDims
from engine.worker.batch import Span

DIMS = ModelDims(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, head_dim=8, vocab=8)
BLOCK = 16
TOKEN_BYTES = 2 * DIMS.head_dim * 2  # a key and a value in bfloat16


def make_mirror(tokens: int) -> KvMirror:
    arena = torch.zeros(2, 2 * BLOCK * DIMS.head_dim, dtype=torch.bfloat16)
    return KvMirror(arena, DIMS, BLOCK, tokens * TOKEN_BYTES)


def step(kv: KvMirror, contexts: Sequence[int]) -> tuple[list[LaneGroup], list[Span]]:
    """One token of each sequence, those of a capacity together; (lanes, spans without one)."""
    by_blocks: dict[int, list[Span]] = {}
    for i, context in enumerate(contexts):
        by_blocks.setdefault(bucket(-(-context // BLOCK)), []).append(Span(i, i, i, 1, context - 1))
    groups, rest = kv.update(by_blocks, np.zeros((len(contexts), 400), np.int64))
    told = [span for group in groups for span in group.spans] + [span for spans in rest.values() for span in spans]
    assert sorted(span.sequence_id for span in told) == list(range(len(contexts)))
    assert sum(lane.nbytes for lane in kv._lanes) <= kv._limit
    assert all(len(group.lane.members) == len(group.spans) <= group.lane.places for group in groups)
    assert all(span.context <= group.lane.capacity for group in groups for span in group.spans)
    return groups, [span for spans in rest.values() for span in spans]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of every lane that took memory which nobody had touched."""
    taken, take = list[int](), Lane._fresh

    def watch(self: Lane, shape: Sequence[int]) -> torch.Tensor | None:
        taken.append(shape[2])
        return take(self, shape)

    monkeypatch.setattr(Lane, "_fresh", watch)
    return taken


def test_long_answers_move_on_in_touched_memory(fresh: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of up to 3,500 tokens in memory for 46,600, as many as the demo has; they move a few steps apart."""
    monkeypatch.setattr(mirror, "SMALL", 0)
    kv, most = make_mirror(46_600), 0
    for context in range(200, 3_500):
        groups, rest = step(kv, [context + 2 * i for i in range(8)])
        most = max(most, len(groups))
        assert not rest
    assert not fresh
    assert 2 <= most <= 6


def test_where_memory_is_plenty_a_capacity_has_one_lane(fresh: list[int]) -> None:
    kv = make_mirror(1 << 16)
    for count in (1, 2, 5, 12):  # they come while it is small, and it grows
        groups, rest = step(kv, [100 + i for i in range(count)])
        assert (len(groups), rest) == (1, [])
    groups, _ = step(kv, [129 + i for i in range(12)])
    assert (len(groups), groups[0].lane.places) == (1, 16)
    assert not fresh


def test_who_is_in_a_lane_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large lanes do not grow: others come beside."""
    monkeypatch.setattr(mirror, "SMALL", 0)
    kv = make_mirror(1 << 16)
    (first,), _ = step(kv, [100, 101])
    groups, _ = step(kv, [101, 102, 103])
    assert [len(group.spans) for group in groups] == [2, 1]
    assert groups[0].lane is first.lane


def test_idle_lanes_make_room() -> None:
    kv = make_mirror(8 * 128 + 160)
    step(kv, [100, 100])
    step(kv, [600])
    assert {lane.capacity for lane in kv._lanes} == {128, 640}
    groups, rest = step(kv, [100] * 8)
    assert sum(len(group.spans) for group in groups) == 8
    assert not rest
    assert {lane.capacity for lane in kv._lanes} == {128}


def test_what_has_no_room_is_told() -> None:
    groups, rest = step(make_mirror(300), [100, 110, 120])
    assert sum(len(group.spans) for group in groups) == 2
    assert len(rest) == 1

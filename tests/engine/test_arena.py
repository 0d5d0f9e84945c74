"""The arena against a brute-force model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.arena import Arena, ChunkUse

USES = [ChunkUse.KV, ChunkUse.PREFIX, ChunkUse.ADAPTER]
Operation = tuple[str, int]


@given(
    st.lists(st.tuples(st.sampled_from(["take", "release", "plan", "commit", "use"]), st.integers(0, 7)), max_size=80)
)
def test_against_a_model(operations: list[Operation]) -> None:
    arena = Arena(12)
    held: dict[int, ChunkUse] = {}
    leaving: dict[int, int] = {}  # chunk -> the step it waits for
    for name, number in operations:
        if name == "take" and number <= 12 - len(held) - len(leaving):
            use = USES[number % 3]
            taken = arena.take(number, use)
            assert not set(taken) & (held.keys() | leaving.keys())
            held.update(dict.fromkeys(taken, use))
        elif name == "take":
            with pytest.raises(MemoryError):
                arena.take(number, ChunkUse.KV)
        elif name == "release" and held:
            chunk = sorted(held)[number % len(held)]
            step = max(arena.planned - number % 3, 0)
            arena.note(chunk, step)
            arena.release([chunk])
            del held[chunk]
            if step > arena.committed:
                leaving[chunk] = step
        elif name == "plan":
            arena.planned += 1
        elif name == "commit" and arena.committed < arena.planned:
            arena.commit(arena.committed + 1)
            leaving = {chunk: step for chunk, step in leaving.items() if step > arena.committed}
        elif name == "use" and held:
            chunk = sorted(held)[number % len(held)]
            held[chunk] = USES[number % 3]
            arena.set_use(chunk, held[chunk])
        arena.check()
        assert arena.free == 12 - len(held) - len(leaving)
        assert arena.coming == len(leaving)
        assert all(arena.owned(use) == {c for c, u in held.items() if u is use} for use in USES)


def test_a_chunk_is_free_only_when_its_last_step_has_committed() -> None:
    arena = Arena(1)
    (chunk,) = arena.take(1, ChunkUse.KV)
    arena.planned = 2
    arena.note(chunk, 2)
    arena.release([chunk])
    arena.commit(1)
    assert (arena.free, arena.coming, arena.counts[ChunkUse.KV]) == (0, 1, 1)
    arena.commit(2)
    assert (arena.free, arena.coming, arena.counts[ChunkUse.KV]) == (1, 0, 0)


def test_an_earlier_step_does_not_take_a_later_note_back() -> None:
    arena = Arena(1)
    (chunk,) = arena.take(1, ChunkUse.KV)
    arena.note(chunk, 5)
    arena.note(chunk, 3)
    assert arena.last_step(chunk) == 5


def test_check_finds_a_chunk_released_twice() -> None:
    arena = Arena(2)
    chunks = arena.take(2, ChunkUse.KV)
    arena.release([chunks[0]])
    arena.release([chunks[0]])
    with pytest.raises(AssertionError):
        arena.check()


def test_adapters_come_from_the_end_and_blocks_from_the_start() -> None:
    """What an adapter of the same size left is together again, whatever blocks came and went."""
    arena = Arena(20)
    first = arena.take(5, ChunkUse.ADAPTER)
    second = arena.take(5, ChunkUse.ADAPTER)
    assert (first, second) == ([15, 16, 17, 18, 19], [10, 11, 12, 13, 14])
    assert arena.take(3, ChunkUse.KV) == [0, 1, 2]
    arena.release([1, 17, 15, 19, 16, 18])
    assert arena.take(2, ChunkUse.KV) == [1, 3]
    assert arena.take(5, ChunkUse.ADAPTER) == [15, 16, 17, 18, 19]
    assert arena.take(0, ChunkUse.ADAPTER) == arena.take(0, ChunkUse.KV) == []

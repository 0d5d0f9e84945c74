"""The arena that loads are measured in is one that the engine could have left."""

from benchmarks.lived_in import LivedIn


def test_no_chunk_is_given_twice_and_neighbours_are_given_where_there_is_room() -> None:
    arena = LivedIn(60_000, {7: 50, 42: 50}, requests=1000)
    chunks = [arena.load(42) for _ in range(20)]
    arena._arena.check()
    assert len({chunk for own in chunks for chunk in own}) == 20 * 42
    assert all(own == tuple(range(own[0], own[0] + 42)) for own in chunks)


def test_a_full_arena_gives_up_who_was_used_longest_ago() -> None:
    arena = LivedIn(3_000, {7: 50, 42: 50}, requests=1000)
    loads = [arena.load(42) for _ in range(100)]
    arena._arena.check()
    assert all(len(set(own)) == 42 for own in loads)
    assert any(own[0] == earlier[0] for i, own in enumerate(loads) for earlier in loads[:i]), "none was given up"

"""References, the prefix cache and its eviction, against brute force."""

import random

import pytest

from engine.arena import Arena, ChunkUse
from engine.blocks import Blocks, Chain, block_digest, chain_seed

SIZE = 4


def make(chunks: int = 16, *, caching: bool = True) -> tuple[Arena, Blocks]:
    arena = Arena(chunks)
    return arena, Blocks(arena, SIZE, caching=caching)


def chain(adapter_id: int | None = None, salt: str | None = None) -> Chain:
    return Chain(chain_seed(adapter_id, salt), SIZE)


def cache(blocks: Blocks, tokens: list[int], adapter_id: int | None = None, salt: str | None = None) -> list[int]:
    """A sequence that ran and ended: its full blocks are cached."""
    table = blocks.allocate(blocks.blocks_for(len(tokens)))
    blocks.register(chain(adapter_id, salt), tokens, table, 0, len(tokens) // SIZE)
    blocks.drop(table, 0)
    return table


def found(blocks: Blocks, tokens: list[int], adapter_id: int | None = None, salt: str | None = None) -> list[int]:
    return blocks.lookup(chain(adapter_id, salt), tokens, len(tokens) - 1)


def test_full_blocks_are_found_and_the_last_token_is_left() -> None:
    _, blocks = make()
    table = cache(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert found(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == table[:2]
    assert found(blocks, [1, 2, 3, 4, 5, 6, 7, 8]) == table[:1]
    assert found(blocks, [1, 2, 3, 4, 5, 6, 7, 0, 9]) == table[:1]
    assert found(blocks, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == []


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ((None, None), (1, None)),
        ((1, None), (2, None)),
        ((None, None), (None, "x")),
        ((1, "x"), (1, "y")),
        ((1, None), (1, "")),
    ],
)
def test_owners_and_salts_never_meet(mine: tuple[int | None, str | None], other: tuple[int | None, str | None]) -> None:
    _, blocks = make()
    tokens = list(range(9))
    cache(blocks, tokens, *mine)
    assert len(found(blocks, tokens, *mine)) == 2
    assert found(blocks, tokens, *other) == []


def test_tokens_are_compared_on_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.blocks.block_digest", lambda parent, tokens: b"collision")
    _, blocks = make()
    cache(blocks, [1, 2, 3, 4, 5])
    assert found(blocks, [1, 2, 3, 4, 5])
    assert not found(blocks, [4, 3, 2, 1, 5])
    assert not found(blocks, [1, 2, 3, 4, 5], adapter_id=1)


def test_a_digest_depends_on_what_came_before() -> None:
    assert block_digest(b"a", [1, 2]) != block_digest(b"b", [1, 2])
    assert block_digest(b"a", [1, 2]) != block_digest(b"a", [2, 1])


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    _, blocks = make()
    tokens = list(range(13))
    table = cache(blocks, tokens)
    for left in (2, 1, 0):
        blocks.evict()
        assert found(blocks, tokens) == table[:left]


def test_least_recently_let_go_is_evicted_first() -> None:
    arena, blocks = make()
    first, second = [1] * 5, [2] * 5
    cache(blocks, first)
    arena.planned = 1
    cache(blocks, second)
    arena.planned = 2
    kept = found(blocks, first)
    blocks.hold(kept)
    blocks.drop(kept, 0)
    assert blocks.oldest() == 1
    blocks.evict()
    assert found(blocks, first)
    assert not found(blocks, second)


def test_a_block_of_an_uncommitted_step_is_not_evicted() -> None:
    arena, blocks = make()
    table = blocks.allocate(1)
    blocks.register(chain(), [1, 2, 3, 4], table, 0, 1)
    arena.planned = 1
    blocks.drop(table, 1)
    assert blocks.oldest() is None
    arena.commit(1)
    assert blocks.oldest() == 1


def test_without_caching_nothing_is_kept() -> None:
    arena, blocks = make(caching=False)
    cache(blocks, list(range(9)))
    assert found(blocks, list(range(9))) == []
    assert arena.free == 16


def test_the_same_content_twice_is_cached_once() -> None:
    arena, blocks = make()
    one, two = blocks.allocate(1), blocks.allocate(1)
    for table in (one, two):
        blocks.register(chain(), [1, 2, 3, 4], table, 0, 1)
    blocks.drop(one, 0)
    blocks.drop(two, 0)
    blocks.check([])
    assert found(blocks, [1, 2, 3, 4, 5]) == one
    assert arena.counts[ChunkUse.PREFIX] == 1


def test_clear_forgets_what_nobody_uses() -> None:
    arena, blocks = make()
    cache(blocks, [1] * 9)
    used = found(blocks, [1] * 9)[:1]
    blocks.hold(used)
    assert blocks.clear() == 1
    assert arena.counts[ChunkUse.KV] == 1
    blocks.check([used])


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    arena, blocks = make(20)
    tables: list[tuple[list[int], list[int], int | None]] = []  # tokens, blocks, adapter
    content: dict[int, tuple[int | None, tuple[int, ...]]] = {}  # chunk -> owner and tokens up to its end
    for _ in range(300):
        match rng.choice(["start", "end", "evict"]):
            case "start":
                tokens = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
                adapter = rng.choice([None, 1])
                kept = found(blocks, tokens, adapter)
                for index, chunk in enumerate(kept):
                    assert content[chunk] == (adapter, tuple(tokens[: (index + 1) * SIZE]))
                need = blocks.blocks_for(len(tokens)) - len(kept)
                if need <= arena.free:
                    blocks.hold(kept)
                    table = kept + blocks.allocate(need)
                    for index in range(len(kept), len(tokens) // SIZE):
                        content[table[index]] = (adapter, tuple(tokens[: (index + 1) * SIZE]))
                    blocks.register(chain(adapter), tokens, table, 0, len(tokens) // SIZE)
                    tables.append((tokens, table, adapter))
            case "end" if tables:
                _, table, _ = tables.pop(rng.randrange(len(tables)))
                blocks.drop(table, 0)
            case "evict" if blocks.idle:
                blocks.evict()
        arena.check()
        blocks.check(table for _, table, _ in tables)

"""KV blocks: which sequences refer to each, and the prefix cache over full ones. Called by the scheduler.

The cache is a hash chain over full blocks. Its seed names the adapter and the salt, so KV of another adapter, of
an earlier load of the same name or of another tenant is never met. Only committed tokens are hashed.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from engine.arena import Arena, ChunkUse
from engine.eviction import EvictionClock


def chain_seed(adapter_id: int | None, salt: str | None) -> bytes:
    """The digest that a chain starts from; tags keep a base, an adapter and a salt from ever looking alike."""
    owner: tuple[object, ...] = ("base",) if adapter_id is None else ("adapter", adapter_id)
    key = owner if salt is None else (*owner, "salt", salt)
    return blake2b(repr(key).encode(), digest_size=16).digest()


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a full block behind `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A full block that can be found again."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]
    chunk: int


class Chain:
    """The digests of one sequence's full blocks, made as far as they were asked for."""

    def __init__(self, seed: bytes, block_tokens: int) -> None:
        self._digests = [seed]
        self._block_tokens = block_tokens

    def block(self, index: int, tokens: list[int]) -> tuple[bytes, bytes, tuple[int, ...]]:
        """(digest, its parent, the block's tokens) of a full block of `tokens`, the sequence's."""
        size = self._block_tokens
        for i in range(len(self._digests) - 1, index + 1):
            self._digests.append(block_digest(self._digests[i], tokens[i * size : (i + 1) * size]))
        return self._digests[index + 1], self._digests[index], tuple(tokens[index * size : (index + 1) * size])


class Blocks:
    """Reference counts of blocks in use, and the cache. A block nobody refers to is cached or released, never lost."""

    def __init__(self, arena: Arena, block_tokens: int, *, caching: bool, clock: EvictionClock | None = None) -> None:
        self.block_tokens = block_tokens
        self.caching = caching
        self._arena = arena
        self._refs: dict[int, int] = {}
        self._by_digest: dict[bytes, CachedBlock] = {}
        self._by_chunk: dict[int, CachedBlock] = {}
        self._clock = EvictionClock(arena) if clock is None else clock
        self._idle: OrderedDict[int, float] = OrderedDict()  # chunk -> clock when let go, oldest first

    @property
    def idle(self) -> int:
        """Cached blocks that nobody refers to."""
        return len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """New blocks, each referred to once; raises MemoryError when too few chunks are free."""
        chunks = self._arena.take(count, ChunkUse.KV)
        for chunk in chunks:
            self._refs[chunk] = 1
        return chunks

    def hold(self, chunks: Iterable[int]) -> None:
        """One more reference to blocks in use or in the cache."""
        for chunk in chunks:
            if chunk in self._idle:
                del self._idle[chunk]
                self._arena.set_use(chunk, ChunkUse.KV)
            self._refs[chunk] = self._refs.get(chunk, 0) + 1

    def drop(self, chunks: Sequence[int], last_step: int) -> None:
        """One reference less; `last_step` is the last step that reads or writes them for the one who lets go.

        Later blocks go first, so that eviction takes a chain from its end.
        """
        for chunk in reversed(chunks):
            self._arena.note(chunk, last_step)
            self._refs[chunk] -= 1
            if not self._refs[chunk]:
                self._let_go(chunk)

    def lookup(self, chain: Chain, tokens: list[int], limit: int) -> list[int]:
        """The longest cached run of the sequence's first blocks, at most `limit` tokens; no reference is taken."""
        found: list[int] = []
        if not self.caching:
            return found
        for index in range(limit // self.block_tokens):
            digest, parent, block = chain.block(index, tokens)
            cached = self._by_digest.get(digest)
            if cached is None or cached.tokens != block or cached.parent != parent:
                break
            found.append(cached.chunk)
        return found

    def register(self, chain: Chain, tokens: list[int], chunks: list[int], first: int, end: int) -> None:
        """Offers full blocks first..end-1 of a sequence, all committed; what is cached already stays private."""
        if not self.caching:
            return
        for index in range(first, end):
            digest, parent, block = chain.block(index, tokens)
            if digest not in self._by_digest and chunks[index] not in self._by_chunk:
                cached = CachedBlock(digest, parent, block, chunks[index])
                self._by_digest[digest] = self._by_chunk[chunks[index]] = cached

    def oldest(self) -> float | None:
        """Clock of the block that `evict` would take; None when there is none that no uncommitted step refers to."""
        for chunk, clock in self._idle.items():
            return clock if self._arena.last_step(chunk) <= self._arena.committed else None
        return None

    def evict(self) -> None:
        """Forgets the cached block that was let go longest ago."""
        chunk, _ = self._idle.popitem(last=False)
        self._forget(chunk)
        self._arena.release((chunk,))

    def clear(self) -> int:
        """Forgets every cached block that nobody refers to; how many there were."""
        count = len(self._idle)
        for _ in range(count):
            self.evict()
        return count

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless references are exactly those of `tables`, the sequences' blocks."""
        assert self._refs == dict(Counter(chunk for table in tables for chunk in table)), "reference counts differ"
        assert set(self._refs) == self._arena.owned(ChunkUse.KV), "blocks in use and chunks differ"
        assert set(self._idle) == self._arena.owned(ChunkUse.PREFIX), "cached blocks and chunks differ"
        assert set(self._idle) <= set(self._by_chunk), "a block is kept that cannot be found"
        assert set(self._by_chunk) <= set(self._idle) | set(self._refs), "a cached block lost its chunk"
        assert all(self._by_chunk[cached.chunk] is cached for cached in self._by_digest.values())
        assert len(self._by_chunk) == len(self._by_digest)

    def _let_go(self, chunk: int) -> None:
        del self._refs[chunk]
        if chunk in self._by_chunk:
            self._idle[chunk] = self._clock.now
            self._arena.set_use(chunk, ChunkUse.PREFIX)
        else:
            self._arena.release((chunk,))

    def _forget(self, chunk: int) -> None:
        cached = self._by_chunk.pop(chunk)
        del self._by_digest[cached.digest]

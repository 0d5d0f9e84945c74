"""An arena in which requests and adapters came and went, as the engine gives and takes its chunks."""

import random
from collections import OrderedDict
from collections.abc import Mapping

from engine.arena import Arena, ChunkUse

SEQUENCES, BLOCKS = 256, (2, 64)  # at most that run at once; blocks of one in the end
NAMES = 1000  # adapters that are asked for, as often as by Zipf 1.0


class LivedIn:
    """No prefix cache: adapters stay until their chunks are wanted, the least recently used goes first."""

    def __init__(self, num_chunks: int, sizes: Mapping[int, int], requests: int = 4000) -> None:
        """sizes: chunks of an adapter -> how many of a hundred adapters have so many."""
        draw = random.Random(1)
        most = max(1, min(SEQUENCES, num_chunks // (2 * BLOCKS[1])))
        self._arena = Arena(num_chunks)
        self._resident: OrderedDict[int, list[int]] = OrderedDict()  # the least recently used first
        kinds = draw.choices(list(sizes), list(sizes.values()), k=NAMES)
        popularity = [1 / (1 + i) for i in range(NAMES)]
        running: list[tuple[list[int], int]] = []  # blocks so far, blocks in the end
        for name in draw.choices(range(NAMES), popularity, k=requests):
            self._use(name, kinds[name])
            self._grow(running, draw)
            if len(running) == most:
                blocks, _ = running.pop(draw.randrange(most))
                self._arena.release(reversed(blocks))
            length = draw.randint(*BLOCKS)
            running.append((self._take(draw.randint(1, length), ChunkUse.KV), length))

    def load(self, count: int) -> tuple[int, ...]:
        """Chunks of one more adapter."""
        chunks = self._take(count, ChunkUse.ADAPTER)
        self._resident[NAMES + chunks[0]] = chunks
        return tuple(chunks)

    def _use(self, name: int, size: int) -> None:
        if name not in self._resident:
            self._resident[name] = self._take(size, ChunkUse.ADAPTER)
        self._resident.move_to_end(name)

    def _grow(self, running: list[tuple[list[int], int]], draw: random.Random) -> None:
        """Some sequences come to their next block."""
        for blocks, length in draw.sample(running, len(running) // 8):
            if len(blocks) < length:
                blocks += self._take(1, ChunkUse.KV)

    def _take(self, count: int, use: ChunkUse) -> list[int]:
        while self._arena.free < count:
            _, chunks = self._resident.popitem(last=False)
            self._arena.release(chunks)
        return self._arena.take(count, use)

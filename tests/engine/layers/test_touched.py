"""Memory lent in parts: no two overlap, what is given back is lent again, and what does not fit is refused."""

import random

from torch import Tensor

from engine.layers.touched import ALIGNMENT, TouchedMemory


def span(part: Tensor) -> range:
    return range(part.data_ptr(), part.data_ptr() + part.nbytes)


def test_parts_never_overlap() -> None:
    rng, memory, parts = random.Random(0), TouchedMemory(1 << 20), list[Tensor]()
    refused = 0
    for _ in range(2000):
        if parts and rng.random() < 0.5:
            memory.give(parts.pop(rng.randrange(len(parts))))
        elif (part := memory.take(rng.randrange(1, 1 << 18))) is not None:
            assert part.data_ptr() % ALIGNMENT == 0
            assert all(span(part).stop <= other.data_ptr() or span(other).stop <= part.data_ptr() for other in parts)
            parts.append(part)
        else:
            refused += 1
    assert refused


def test_all_of_it_comes_back() -> None:
    memory = TouchedMemory(4 * ALIGNMENT)
    parts = [memory.take(ALIGNMENT) for _ in range(4)]
    assert memory.take(1) is None
    for part in parts:
        assert part is not None
        memory.give(part)
    whole = memory.take(4 * ALIGNMENT)
    assert whole is not None
    assert whole.nbytes == 4 * ALIGNMENT


def test_memory_of_others_is_not_taken_back() -> None:
    memory = TouchedMemory(ALIGNMENT)
    assert memory.take(ALIGNMENT) is not None
    memory.give(Tensor(4))
    assert memory.take(1) is None


def test_nothing_is_lent_where_there_is_nothing() -> None:
    assert TouchedMemory(0).take(1) is None

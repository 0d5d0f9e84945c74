"""How an adapter's pages reach its chunks: neighbours on both sides are one copy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.adapters.device_bank import neighbours

BYTES, CHUNKS = 8, 12


def copied(chunks: list[int], pages: list[Tensor]) -> tuple[Tensor, int]:
    """(the arena after the load, copies)."""
    arena = torch.zeros(CHUNKS, BYTES, dtype=torch.uint8)
    runs = list(neighbours(chunks, pages))
    for first, run in runs:
        arena[first : first + len(run)].copy_(run)
    return arena, len(runs)


def slab(count: int) -> Tensor:
    return torch.randint(1, 256, (count, BYTES), dtype=torch.uint8)


@given(st.lists(st.tuples(st.integers(0, CHUNKS - 1), st.integers(0, 1)), max_size=CHUNKS, unique_by=lambda x: x[0]))
def test_every_page_reaches_its_chunk(places: list[tuple[int, int]]) -> None:
    slabs = slab(CHUNKS), slab(CHUNKS)
    chunks, pages = (
        [chunk for chunk, _ in places],
        [slabs[which][CHUNKS - 1 - i] for i, (_, which) in enumerate(places)],
    )
    wanted = torch.zeros(CHUNKS, BYTES, dtype=torch.uint8)
    for chunk, page in zip(chunks, pages, strict=True):
        wanted[chunk] = page
    arena, _ = copied(chunks, pages)
    assert torch.equal(arena, wanted)


def test_neighbours_on_both_sides_are_one_copy() -> None:
    pages = list(slab(6).unbind())
    assert copied([3, 4, 5, 6, 7, 8], pages)[1] == 1
    assert copied([3, 4, 6, 7, 8, 9], pages)[1] == 2, "chunks apart"
    assert copied([3, 4, 5, 6, 7, 8], [*pages[:2], *pages[3:], pages[2]])[1] == 3, "pages apart"
    assert copied([8, 7, 6], pages[:3])[1] == 3, "the other way round"
    assert copied([], [])[1] == 0


def test_as_many_chunks_as_pages() -> None:
    with pytest.raises(ValueError, match="zip"):
        copied([3, 4], list(slab(3).unbind()))


def test_pages_of_two_slabs_are_not_one_copy_even_side_by_side() -> None:
    memory = slab(4)
    first, second = memory.numpy()[:2], memory.numpy()[2:]  # side by side, each a storage of its own
    pages = [*torch.from_numpy(first).unbind(), *torch.from_numpy(second).unbind()]
    arena, copies = copied([0, 1, 2, 3], pages)
    assert copies == 2
    assert torch.equal(arena[:4], memory)

"""Memory for adapters' bytes: of the size asked for, zero, and every such memory its own."""

import pytest
import torch

from engine.adapters.pages import HEAP_PART, KEPT, KEPT_BYTES, ReusedPages, fresh_pages, touch_heap


@pytest.mark.parametrize("size", [0, 1, 4097, 5 << 20])
def test_pages_are_zeros_of_the_size_asked_for(size: int) -> None:
    pages = fresh_pages(size)
    assert (pages.shape, pages.dtype) == ((size,), torch.uint8)
    assert not pages.any()


def test_pages_are_their_owners_alone() -> None:
    one, other = fresh_pages(1 << 20), fresh_pages(1 << 20)
    part = one[100:200]
    part.fill_(7)
    del one
    assert not other.any()
    assert int(part.sum()) == 700, "a view keeps its memory"


def test_memory_that_is_not_to_be_had_is_an_error() -> None:
    with pytest.raises(MemoryError):
        fresh_pages(1 << 60)


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    pages = ReusedPages()
    whole = pages.take(5000)
    whole[:] = 7
    view = torch.from_numpy(whole[100:200]).view(torch.int32)
    del whole
    assert not pages.take(5000).any(), "a view keeps its memory"
    assert int(view[0]) == 0x07070707
    del view
    assert sum(int(part.sum()) for part in [pages.take(4000), pages.take(4000)]) == 7 * 4000


def test_smaller_memory_is_not_used_again() -> None:
    pages = ReusedPages()
    pages.take(10)[:] = 1
    assert len(pages.take(20)) == 20
    assert len(pages.take(0)) == 0


def test_little_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, given = ReusedPages(), list[int]()

    def counted(size: int) -> torch.Tensor:
        given.append(size)
        return torch.zeros(min(size, KEPT_BYTES + 1), dtype=torch.uint8)

    monkeypatch.setattr("engine.adapters.pages.fresh_pages", counted)
    for _ in range(2):
        taken = [pages.take(8) for _ in range(KEPT + 1)]
        del taken
    assert len(given) == KEPT + 2
    pages = ReusedPages()
    for _ in range(2):
        pages.take(KEPT_BYTES + 1)
    assert given[-2:] == [KEPT_BYTES + 1] * 2


@pytest.mark.parametrize(("size", "turns"), [(0, 0), (1, 1), (HEAP_PART, 1), (5 * HEAP_PART + 1, 6), (40 << 20, 40)])
def test_the_heap_is_touched_in_parts(size: int, turns: int) -> None:
    taken = list[None]()
    touch_heap(size, lambda: taken.append(None))
    assert len(taken) == turns

"""Memory for adapters' bytes: of the size asked for, zero, and every such memory its own."""

import pytest
import torch

from engine.adapters.pages import fresh_pages


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

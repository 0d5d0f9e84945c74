"""Which steps overlap what. The GPU tests compare the results."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.models import overlap as overlap_module
from engine.models.overlap import FIRST_TOKENS, KEEP_TOKENS, NEVER, OFF, PDL_TOKENS, Overlap, default_overlap
from kernels.launch import DECODE_TOKENS, PRODUCT_ROWS
from kernels.lora_meta import GROUP_STARTS, LARGE_ROWS, LARGE_TOKENS, LoraGroup

LONG = 3 * 64


def weight(inner: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(64, inner, dtype=dtype)


@pytest.mark.parametrize(
    ("overlap", "tokens", "inner", "product", "dependent"),
    [
        (Overlap(), 1, 64, True, True),
        (Overlap(), PRODUCT_ROWS, 64, True, True),
        (Overlap(), PRODUCT_ROWS + 1, 64, False, True),
        (Overlap(), 2 * PRODUCT_ROWS - 1, 64, False, True),
        (Overlap(), 2 * PRODUCT_ROWS, 64, True, True),
        (Overlap(), 2 * PRODUCT_ROWS, LONG, True, True),
        (Overlap(), 2 * PRODUCT_ROWS + 1, LONG, False, True),
        (Overlap(), PDL_TOKENS + 1, 64, False, False),
        (replace(Overlap(), products=0), 1, LONG, False, True),
        (replace(Overlap(), pdl=False), 1, 64, True, False),
        (OFF, 1, 64, False, False),
    ],
    ids=str,
)
def test_small_steps_overlap(overlap: Overlap, tokens: int, inner: int, product: bool, dependent: bool) -> None:
    assert (overlap.product(tokens, weight(inner), lora=False), overlap.dependent(tokens)) == (product, dependent)


def test_beside_lora_more_products_are_ours() -> None:
    """All but those whose weight has many short rows."""
    tokens = 2 * PRODUCT_ROWS
    square, long, short = weight(), weight(LONG), torch.zeros(LONG, 64, dtype=torch.bfloat16)
    assert [Overlap().product(tokens, w, lora=True) for w in (square, long, short)] == [True, True, False]
    assert not Overlap().product(tokens + 1, square, lora=True)
    assert not OFF.product(1, square, lora=True)


@pytest.mark.parametrize(
    ("overlap", "tokens", "first"),
    [
        (Overlap(), FIRST_TOKENS, [False, True, False, False]),
        (Overlap(), FIRST_TOKENS + 1, [False] * 4),
        (Overlap(), PRODUCT_ROWS + 1, [True, True, False, True]),
        (Overlap(), DECODE_TOKENS, [True, True, False, True]),
        (Overlap(), DECODE_TOKENS + 1, [True] * 4),
        (OFF, 1, [True] * 4),
    ],
    ids=str,
)
def test_who_goes_first(overlap: Overlap, tokens: int, first: list[bool]) -> None:
    """Of qkv, o, gate_up, down: shrink and expand before the product, or behind it."""
    groups = [LoraGroup(start, 64, (64,)) for start in GROUP_STARTS]
    assert [overlap.lora_first(tokens, group) for group in groups] == first


def test_activations_of_small_steps_are_kept() -> None:
    assert [Overlap().keeps(tokens) for tokens in (1, KEEP_TOKENS, KEEP_TOKENS + 1)] == [True, True, False]
    assert not OFF.keeps(1)


def test_shrink_starts_early_but_beside_our_products_of_more_than_64_rows() -> None:
    sizes = (1, PRODUCT_ROWS, PRODUCT_ROWS + 1, 2 * PRODUCT_ROWS, 2 * PRODUCT_ROWS + 1)
    assert [Overlap().early(tokens) for tokens in sizes] == [True, True, False, False, True]


@pytest.mark.parametrize(("tokens", "full"), [(2048, False), (2304, False), (2816, True), (3328, False), (8192, True)])
def test_deltas_are_taken_in_where_turns_are_full(tokens: int, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """132 multiprocessors, tiles of 128 x 256."""
    monkeypatch.setattr(overlap_module, "multiprocessors", lambda device: 132)
    square = torch.empty(4096, 8, dtype=torch.bfloat16)
    assert Overlap().takes_delta(tokens, square) == full
    assert Overlap(fill=0.0).takes_delta(tokens, square) == (tokens > 2048)
    assert not Overlap(fill=2.0).takes_delta(tokens, square)


def test_decodes_run_beside_large_prompts_alone() -> None:
    assert [Overlap().decodes_beside(tokens, None) for tokens in (LARGE_TOKENS, LARGE_TOKENS + 1)] == [0, 2]
    assert [Overlap().decodes_beside(2048, decodes) for decodes in (0, 63, 64)] == [0, 0, 2]
    assert OFF.decodes_beside(1 << 20, None) == Overlap(decodes_each=0).decodes_beside(1 << 20, None) == 0


@pytest.mark.parametrize(
    ("overlap", "tokens", "merged", "onto"),
    [
        (Overlap(), LARGE_TOKENS - 1, False, False),
        (Overlap(), LARGE_TOKENS, True, False),
        (Overlap(), LARGE_TOKENS + 1, True, True),
        (OFF, 1 << 20, False, False),
    ],
    ids=str,
)
def test_products_of_large_steps_do_what_follows(overlap: Overlap, tokens: int, merged: bool, onto: bool) -> None:
    assert (overlap.merges(tokens, weight(), lora=True), overlap.onto_residual(tokens, weight())) == (merged, onto)


def test_tma_reads_rows_of_16_bytes() -> None:
    assert not Overlap().merges(LARGE_TOKENS, weight(inner=68), lora=True)
    assert not Overlap().merges(LARGE_TOKENS, torch.zeros(72, 64, dtype=torch.bfloat16), lora=True)


def test_products_of_four_bytes_an_element_are_the_librarys() -> None:
    exact = weight(dtype=torch.float32)
    assert not Overlap().product(1, exact, lora=False)
    assert not Overlap().merges(LARGE_TOKENS, exact, lora=True)
    assert not Overlap().onto_residual(LARGE_TOKENS + 1, exact)


@pytest.mark.parametrize(
    ("capability", "overlap"),
    [((8, 9), OFF), ((9, 0), Overlap()), ((10, 3), Overlap()), ((12, 0), Overlap(products=0, large=NEVER))],
    ids=str,
)
def test_a_card_overlaps_what_it_can(
    capability: tuple[int, int], overlap: Overlap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_overlap(torch.device("cuda")) == overlap


def test_the_interpreter_overlaps_nothing() -> None:
    assert default_overlap(torch.device("cpu")) == OFF


def test_without_lora_a_small_step_that_fills_the_tile_is_merged() -> None:
    merged = [Overlap().merges(tokens, weight(), lora=False) for tokens in (LARGE_ROWS - 1, LARGE_ROWS, LARGE_ROWS + 1)]
    assert merged == [False, True, False]
    assert not OFF.merges(LARGE_ROWS, weight(), lora=False)
    assert not Overlap().merges(LARGE_ROWS, weight(), lora=True)

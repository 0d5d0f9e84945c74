"""Collections of everything wait until nothing runs."""

import gc
from collections.abc import Iterator

import pytest

from engine.collector import RARE, USUAL, collect_if_due, collect_rarely


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_all_is_collected_when_it_is_due_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    collect_rarely()
    assert gc.get_threshold()[2] == RARE
    gc.collect()
    collected = list[int]()
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    collect_if_due()
    assert not collected
    for _ in range(USUAL + 1):
        gc_middle()
    collect_if_due()
    assert collected


def gc_middle() -> None:
    real = gc.get_count()[2]
    while gc.get_count()[2] == real:
        kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
        del kept

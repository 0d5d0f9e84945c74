"""Collections of everything wait until nothing runs; what was there before is left out."""

import gc

import pytest

from engine.collector import RARE, USUAL, collect_if_due, collecting_rarely


def test_all_is_collected_when_it_is_due_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting_rarely():
        assert gc.get_threshold()[2] == RARE
        collected = list[int]()
        with monkeypatch.context() as patch:
            patch.setattr(gc, "collect", lambda: collected.append(1))
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


def test_what_is_there_already_is_left_out_until_the_end() -> None:
    before = gc.get_threshold()
    early: list[object] = []
    with collecting_rarely():
        late: list[object] = []
        looked = {id(found) for found in gc.get_objects()}
        assert id(late) in looked
        assert id(early) not in looked
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0

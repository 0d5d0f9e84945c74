"""While the gateway serves, new objects alone are looked through, and not at every step."""

import gc

import pytest

from gateway.collector import YOUNG, collecting_less


def test_new_objects_alone_until_the_end() -> None:
    before = gc.get_threshold()
    early: list[object] = []
    with collecting_less():
        late: list[object] = []
        assert gc.get_threshold() == (YOUNG, *before[1:])
        looked = {id(found) for found in gc.get_objects()}
        assert id(late) in looked
        assert id(early) not in looked
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), collecting_less():
        raise KeyError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0

"""Our import package `kernels` and Hugging Face's of the same name are told apart, by us and by transformers."""

import sys
from pathlib import Path

import pytest

from gateway.kernels_check import is_own, require_own_kernels
from gateway.settings import SettingsError


def test_ours_is_found() -> None:
    require_own_kernels()


def test_another_is_refused_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with pytest.raises(SettingsError, match="pip uninstall kernels") as caught:
        require_own_kernels()
    assert str(tmp_path) in str(caught.value)
    assert not is_own(tmp_path / "kernels" / "__init__.py")


def test_none_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="reinstall loramux"):
        require_own_kernels()


def test_transformers_does_not_take_ours_for_hugging_faces() -> None:
    """It asks for the version of whatever distribution provides a package `kernels`, and wants a range of them.

    Fails when a release of loramux is numbered so.
    """
    from transformers.utils import import_utils

    assert import_utils.is_kernels_available() is False

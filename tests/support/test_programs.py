"""What a machine without a program does: the test is skipped by name, under continuous integration it fails."""

import pytest

from tests.support.programs import program

MISSING = "program-that-nobody-has"


def test_elsewhere_a_missing_program_skips_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"{MISSING} is missing.*apt-get.* package-of-it"):
        program(MISSING, package="package-of-it")


def test_under_continuous_integration_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"{MISSING} is missing"):
        program(MISSING, package="package-of-it")

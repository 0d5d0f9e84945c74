"""Programs of Debian's packages that some tests need."""

import os
import shutil

import pytest


def program(name: str, *, package: str) -> str:
    """The program's path. Skips the test where it is missing; under continuous integration that is a failure."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is missing: apt-get install --no-install-recommends {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found

"""The order of the tests: files that take long come first, so that no process is left alone with one at the end."""

from pathlib import Path

import pytest

LONG = ("engine/worker/test_device.py", "parity")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: not any(item.path.is_relative_to(here / long) for long in LONG))

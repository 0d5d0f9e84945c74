"""Tests on an accelerator: skipped without one; what they measured is kept beside the junit file.

GPU_FIGURES=benchmarks/results/gpu-tests.json pytest -m gpu tests --junitxml=benchmarks/results/gpu-tests.xml
"""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.report import environment

Figures = dict[str, object]
FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """What a test measured, by its name."""
    return request.config.stash[FIGURES]


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where GPU_FIGURES names a file, the figures with card, versions and commit."""
    path = os.environ.get("GPU_FIGURES")
    figures = session.config.stash[FIGURES]
    if path and figures:
        kept = {**environment(os.environ.get("COMMIT", "")), "exit": int(exitstatus), "figures": figures}
        Path(path).write_text(json.dumps(kept, indent=1) + "\n")

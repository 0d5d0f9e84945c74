"""Tests on an accelerator: skipped without one; what they measured is kept beside the junit file.

GPU_FIGURES=benchmarks/results/gpu-tests.json pytest -m gpu tests --junitxml=benchmarks/results/gpu-tests.xml
"""

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.report import environment

Figures = Callable[[str, Mapping[str, object]], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def figures() -> Figures:
    """Keeps what a test measured under a name; several processes may do so at once."""

    def keep(name: str, values: Mapping[str, object]) -> None:
        if path := os.environ.get("GPU_FIGURES"):
            with Path(f"{path}.lines").open("a") as lines:
                lines.write(json.dumps({"name": name, **values}) + "\n")

    return keep


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where GPU_FIGURES names a file, the figures with card, versions and commit."""
    path = os.environ.get("GPU_FIGURES")
    if path and not hasattr(session.config, "workerinput") and (lines := Path(f"{path}.lines")).exists():
        figures = [json.loads(line) for line in lines.read_text().splitlines()]
        kept = {**environment(os.environ.get("COMMIT", "")), "exit": int(exitstatus), "figures": figures}
        Path(path).write_text(json.dumps(kept, indent=1) + "\n")

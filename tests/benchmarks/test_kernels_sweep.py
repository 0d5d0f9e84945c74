"""The sweep over the LoRA kernels: popularity, the axes, and its short form in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels_sweep import FULL, POPULARITIES, SMALL, Case, tokens_by_adapter


@pytest.mark.parametrize(
    ("popularity", "counts"),
    [("distinct", [4, 4, 4, 4]), ("identical", [16, 0, 0, 0]), ("skewed", [8, 3, 3, 2])],
)
def test_what_tokens_name(popularity: str, counts: list[int]) -> None:
    assert tokens_by_adapter(Case(16, 8, 4, popularity, 4)) == counts


def test_drawn_popularity() -> None:
    uniform, zipf = (tokens_by_adapter(Case(4000, 8, 4, kind, 4)) for kind in ("uniform", "zipf"))
    assert sum(uniform) == sum(zipf) == 4000
    assert max(uniform) < 1150
    assert zipf[0] > 1.7 * zipf[1] > 0


def test_the_axes_reach_from_end_to_end() -> None:
    cases = list(FULL.cases())
    assert {min(c.tokens for c in cases), max(c.tokens for c in cases)} == {1, 8192}
    assert {min(c.rank for c in cases), max(c.rank for c in cases)} == {8, 256}
    assert {min(c.active for c in cases), max(c.active for c in cases)} == {1, 64}
    assert {min(c.slots for c in cases), max(c.slots for c in cases)} == {8, 64}
    assert {c.popularity for c in cases} == set(POPULARITIES)
    assert all(c.active <= c.slots for c in cases)


def test_short_form(tmp_path: Path) -> None:
    """In a process of its own: Triton learns when it is imported whether it interprets."""
    command = [sys.executable, "-m", "benchmarks.kernels_sweep", "--tiny", "--folder", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "kernels_sweep-tiny.json").read_text())["rows"]
    assert len(rows) == 2 + len(set(SMALL.cases()))
    assert all(row["median"] > 0 for row in rows)

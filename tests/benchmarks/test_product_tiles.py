"""Which tiles of our products are tried, and the short form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.product_tiles import FULL, Shape
from kernels.launch import PRODUCT_MEMORY


@pytest.mark.parametrize("rows", FULL.rows)
@pytest.mark.parametrize("shape", FULL.shapes, ids=lambda shape: shape.name)
def test_tiles_fit_a_multiprocessor_and_hold_every_column(shape: Shape, rows: int) -> None:
    found = list(FULL.tiles(shape, rows, torch.device("cpu")))
    assert found
    for tiles in found:
        assert tiles.programs * tiles.columns >= shape.features
        assert tiles.rows >= rows
        assert (tiles.columns + tiles.rows) * tiles.inner * 2 * tiles.stages <= PRODUCT_MEMORY
        assert shape.inner % (tiles.inner * tiles.parts) == 0
    assert {tiles.parts for tiles in found} == (set(FULL.parts) if shape.summed else {1})


def test_short_form(tmp_path: Path) -> None:
    """In a process of its own: Triton learns when it is imported whether it interprets."""
    command = [sys.executable, "-m", "benchmarks.product_tiles", "--tiny", "--folder", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "product_tiles-tiny.json").read_text())["rows"]
    assert {row["name"].split(":")[0] for row in rows} == {"qkv, 2 rows", "down, 2 rows"}
    ours = [row for row in rows if "error" in row["note"]]
    assert len(ours) >= 4
    assert all(row["median"] > 0 for row in rows)
    assert all(float(row["note"].rsplit(" ", 1)[1]) < 1e-5 for row in ours)

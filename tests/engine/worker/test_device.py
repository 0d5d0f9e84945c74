"""The worker's Triton path without a GPU: cases in processes whose kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path


def run(cases: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = str(Path(__file__).with_name(cases))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_the_triton_path_agrees_with_the_torch_path() -> None:
    run("device_cases.py")


def test_start_compiles_what_steps_launch() -> None:
    run("ahead_cases.py")

"""The worker's Triton path without a GPU: device_cases.py in a process whose kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("device_cases.py")


def test_the_triton_path_agrees_with_the_torch_path() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

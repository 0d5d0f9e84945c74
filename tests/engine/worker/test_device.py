"""The worker's Triton path without a GPU, in processes of its own: its kernels are interpreted, or only compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(cases: str, *options: str, interpret: bool = True) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    path = str(Path(__file__).with_name(cases))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_the_triton_path_agrees_with_the_torch_path() -> None:
    run("device_cases.py", "-m", "not slow")


@pytest.mark.slow
def test_the_whole_triton_path_agrees_with_the_torch_path() -> None:
    run("device_cases.py", "-m", "slow")


def test_start_compiles_what_steps_launch() -> None:
    run("ahead_cases.py", "-m", "not slow")


@pytest.mark.slow
def test_start_compiles_what_other_steps_launch() -> None:
    run("ahead_cases.py", "-m", "slow")


def test_each_kernel_compiles_for_a_card() -> None:
    run("card_cases.py", "-m", "not slow", interpret=False)


@pytest.mark.slow
def test_all_kernels_compile_for_all_cards() -> None:
    run("card_cases.py", "-m", "slow", interpret=False)

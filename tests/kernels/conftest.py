"""Kernels run on the accelerator where there is one, else in Triton's interpreter, which is right in float32 only."""

import importlib
import os
import sys

import pytest
import torch

KERNELS = (
    "ahead",
    "attention_decode",
    "attention_prefill",
    "columns",
    "fetch",
    "kv_store",
    "large_product",
    "lora_expand",
    "lora_gather",
    "lora_shrink",
    "norm",
    "product",
    "rotary",
    "sample",
    "silu_mul",
    "step_input",
)


def _import_interpreted() -> None:
    """Triton reads the variable when a kernel is decorated, its own library's functions included, and never again.

    So it is set for these imports alone; triton and kernels that something else imported before are imported afresh.
    """
    own = {f"kernels.{name}" for name in KERNELS}
    for name in list(sys.modules):
        if name in own or (name.split(".")[0] == "triton" and "._C" not in name):
            del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.experimental.gluon")  # which triton itself imports at the first launch
        for name in KERNELS:
            importlib.import_module(f"kernels.{name}")
    finally:
        del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    _import_interpreted()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(
    params=[
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(torch.float16, marks=pytest.mark.gpu),
    ],
    ids=["fp32", "bf16", "fp16"],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(autouse=True)
def _needs_accelerator(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an accelerator")

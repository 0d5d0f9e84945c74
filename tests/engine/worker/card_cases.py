"""Kernels compile for cards that are not there: what a server's start asks for is written down, and compiled.

Runs in a process of its own, as device_cases.py does, but without Triton's interpreter, which takes kernels that its
compiler refuses.
"""

import contextlib
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.models.overlap import default_overlap
from tests.engine.worker.device_cases import start_interpreted
from tests.support.models import write_model

MULTIPROCESSORS = 132
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a program may take, by capability
THREADS = 2


class Card:
    """As much of a card's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self._device = object()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> object:  # what was compiled is kept under it
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0


class Asked:
    """The kernels of launches, which do nothing: each by its name and what it is compiled for."""

    def __init__(self) -> None:
        self.kernels: dict[tuple[str, str], tuple[Any, str]] = {}

    def __call__(self, *, key: str, fn: Any, compile: Any, is_manual_warmup: bool, **_: object) -> bool:
        if is_manual_warmup:
            return False
        self.kernels.setdefault((fn.name, key), (fn.jit_function, compile["specialization_data"]))
        return True

    def one_of_each(self) -> list[tuple[Any, str]]:
        return list({name: kernel for (name, _), kernel in self.kernels.items()}.values())


def everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Sets what modules of the kernels and the engine have imported by name."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] in ("kernels", "engine") and hasattr(module, name):
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int) -> Asked:
    """What a server over a model of Llama's head size asks for."""
    everywhere(monkeypatch, "has_tma", lambda _: capability >= 90)
    everywhere(monkeypatch, "multiprocessors", lambda _: MULTIPROCESSORS)
    everywhere(monkeypatch, "compiling_ahead", lambda *_: contextlib.nullcontext())
    for product in ("mm", "addmm"):  # the CPU's have no float32 result of narrower inputs
        monkeypatch.setattr(torch, product, lambda *_, **__: None)
    monkeypatch.setattr(driver, "_active", Card(capability))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    folder = write_model(
        tmp_path / "llama", hidden=1024, heads=8, kv_heads=2, head_dim=128, intermediate=3584, dtype=torch.bfloat16
    )
    worker = start_interpreted(
        folder, dtype="bfloat16", context_length=8192, max_total_tokens=9000, chunked_prefill_size=2304,
        max_running_requests=256, max_lora_rank=64,
    )  # fmt: skip
    runner, found = cast("Any", worker._runner), Asked()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(capability, 10))
    runner._decoder.overlap(default_overlap(torch.device("cuda")))
    with knobs.runtime.scope(), torch.inference_mode():
        knobs.runtime.jit_cache_hook = found
        runner.compile(1, lora=True, progress=lambda *_: None)
    return found


def compile_all(kernels: Iterable[tuple[Any, str]], shared: int) -> None:
    """Python 3.11's parser fails at times in threads (its issue 106905): what failed there is compiled once more."""
    with ThreadPoolExecutor(THREADS) as pool:
        compiling = [(kernel, pool.submit(kernel.preload, data), data) for kernel, data in kernels]
    for kernel, future, data in compiling:
        compiled = kernel.preload(data) if future.exception() else future.result()
        assert compiled.metadata.shared <= shared, compiled.metadata


@pytest.mark.parametrize("capability", [90])
def test_each_kernel_compiles(asked: Asked, capability: int) -> None:
    kernels = asked.one_of_each()
    assert len(kernels) > 15
    compile_all(kernels, SHARED[capability])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_all_kernels_compile(asked: Asked, capability: int) -> None:
    assert len(asked.kernels) > 50
    compile_all(asked.kernels.values(), SHARED[capability])

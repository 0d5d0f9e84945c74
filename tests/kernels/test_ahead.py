"""Kernels compiled ahead: launches are left out, each kernel is compiled once, failures wait for the launch."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from kernels.ahead import compiling_ahead


class Kernel:
    """What Triton tells of a kernel."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.module, self.name, self.jit_function = "kernels", name, self
        self.error = error
        self.compiled: list[tuple[str, str]] = []  # what, by which thread

    def preload(self, data: str) -> None:
        assert not ask(self, data, warmup=True)  # the compiler's own question
        self.compiled.append((data, threading.current_thread().name))
        if self.error:
            raise self.error


def ask(kernel: Kernel, key: str, *, warmup: bool = False) -> bool:
    """As Triton does before it compiles; whether it is to leave that, and the launch."""
    hook: Any = knobs.runtime.jit_cache_hook
    told = {"key": key, "specialization_data": key}
    return bool(hook(key=key, repr="", fn=kernel, compile=told, is_manual_warmup=warmup, already_compiled=False))


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(set_device=lambda _: None, current_device=lambda: 0))


def test_each_kernel_is_compiled_once_by_a_thread() -> None:
    one, other = Kernel("one"), Kernel("other")
    told: list[tuple[int, int]] = []
    with compiling_ahead(2, lambda *counts: told.append(counts)):
        assert all(ask(kernel, key) for kernel, key in ((one, "a"), (other, "a"), (one, "a"), (one, "b")))
    assert sorted(key for key, _ in one.compiled) == ["a", "b"]
    assert len(other.compiled) == 1
    assert {thread.split("_")[0] for _, thread in one.compiled} == {"compiler"}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert knobs.runtime.jit_cache_hook is None


def test_a_kernel_that_does_not_compile_is_left_to_its_launch() -> None:
    bad, good = Kernel("bad", ValueError("no")), Kernel("good")
    with compiling_ahead(1, lambda *_: None):
        assert ask(bad, "a")
        assert ask(good, "a")
    assert good.compiled


def test_an_error_does_not_wait_for_what_was_asked() -> None:
    kernels = [Kernel(str(i)) for i in range(50)]
    began = threading.Event()

    def slow(data: str) -> None:
        began.set()
        time.sleep(0.05)

    kernels[0].preload = slow  # type: ignore[method-assign]

    def fail() -> None:
        with compiling_ahead(1, lambda *_: None):
            for kernel in kernels:
                ask(kernel, "a")
            began.wait()
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert not any(kernel.compiled for kernel in kernels)
    assert knobs.runtime.jit_cache_hook is None

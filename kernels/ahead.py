"""Kernels compiled several at a time, before the first step needs them.

Triton compiles a kernel at its first launch, half a second for each of some eighty. Here launches tell which are
needed, and threads compile them: Triton's compiler leaves the interpreter to others for most of its work.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch
from triton import knobs
from triton.knobs import JITHookCompileInfo
from triton.runtime.jit import JitFunctionInfo

Told = Callable[[int, int], None]  # (kernels compiled, kernels asked for)
MOST_THREADS = 16


def default_threads() -> int:
    """As many as there are cores, within reason."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def compiling_ahead(threads: int, told: Told) -> Iterator[None]:
    """Launches inside do nothing where their kernel is not compiled yet; at the end all of these kernels are.

    A kernel that does not compile is left to the launch that needs it, which says why.
    """
    asked: dict[tuple[str, str, str], Future[object]] = {}
    with ThreadPoolExecutor(threads, "compiler", torch.cuda.set_device, (torch.cuda.current_device(),)) as pool:

        def ask(
            *, key: str, fn: JitFunctionInfo, compile: JITHookCompileInfo, is_manual_warmup: bool, **_: object
        ) -> bool:
            """Triton's question before it compiles: whether that, and the launch, is to be left."""
            if is_manual_warmup:  # the threads' own
                return False
            name = fn.module, fn.name, key
            if name not in asked:
                asked[name] = pool.submit(fn.jit_function.preload, compile["specialization_data"])
            return True

        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = ask
            try:
                yield
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for done, _ in enumerate(as_completed(asked.values()), 1):
                told(done, len(asked))

"""What start compiles ahead is all that steps launch, of every size: launches are written down, and none is run.

Runs in a process of its own, as device_cases.py does.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from engine.models.overlap import Overlap
from engine.plan import Admission, StepPlan
from engine.types import SamplingParams
from engine.worker import device_runner
from engine.worker.worker import Worker
from tests.engine.worker.device_cases import start_interpreted, with_adapters
from tests.engine.worker.test_device_batch import step as sequence
from tests.support.models import write_model

OPTIONS = "num_warps", "num_stages", "maxnreg", "launch_pdl"
GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
PROMPTS = 5
Launch = tuple[object, ...]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """Each kernel with what it is compiled for: its constants, its tensors' types, its options."""
    found: set[Launch] = set()

    def run(kernel: Any, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        values = dict(zip(parameters, args, strict=False)) | kwargs
        constants = [(n, str(values[n])) for n, p in parameters.items() if p.annotation is tl.constexpr]
        types = [(n, str(v.dtype)) for n, v in values.items() if isinstance(v, Tensor)]
        found.add((kernel.__name__, *constants, *types, *((n, values.get(n)) for n in OPTIONS)))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


def step(worker: Worker, number: int, spans: Sequence[tuple[int, int]]) -> None:
    """spans: (slot, tokens) of each sequence; one token is a decode."""
    size = worker.info.geometry.block_tokens
    admissions, sequences = [], []
    for row, (slot, length) in enumerate(sorted(spans, key=lambda span: (span[0] < 0, span))):
        start = 20 if length == 1 else 0
        tokens, blocks = (3,) * (start + length), tuple(range(-(-(start + length) // size)))
        admissions.append(Admission(row, row, tokens, start + length, 0, GREEDY))
        sequences.append(sequence(row, start, tokens[start:], length, slot, new_blocks=blocks))
    plan = StepPlan(number, (1, 2, 3, 4), admissions=tuple(admissions), sequences=tuple(sequences))
    worker.forward(plan)
    worker.sample(plan).result()


def steps(owners: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, int]]]:
    """Prompts and decodes; owners: slots that take turns in a step."""
    for slots in owners:
        for decodes in (1, 5, 33, 64, 65, 128, 129, 200, 256):
            yield [(slots[i % len(slots)], 1) for i in range(decodes)]
        for tokens in (20, 100, 200, 300, 600, 1000, 1100, 1500, 2048, 2304, 2816, 4096, 4352, 8192):
            for decodes in (0, 1, 70):
                each = (tokens - decodes) // PROMPTS
                if each > 1:
                    prompts = [each] * (PROMPTS - 1) + [tokens - decodes - each * (PROMPTS - 1)]
                    lengths = [*prompts, *[1] * decodes]
                    yield [(slots[i % len(slots)], length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(
    "owners",
    [
        ((-1,), (0, 1, 2, 3, -1)),
        pytest.param(((0,), (1, -1), (2, 3)), marks=pytest.mark.slow),
    ],
    ids=["nobody's and all", "some"],
)
def test_no_step_waits_for_a_kernel(
    owners: Sequence[tuple[int, ...]], tmp_path: Path, launches: set[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slot 0 has q and v, 1 down, 2 all, 3 o, gate and up."""
    folder = write_model(tmp_path / "llama", vocab=250, layers=2)
    worker = start_interpreted(
        folder, context_length=2048, max_total_tokens=9000, chunked_prefill_size=8192, max_running_requests=256
    )
    with_adapters(worker)
    runner = cast("Any", worker._runner)
    runner._decoder.overlap(Overlap(widest=4, fill=0.95))  # of 4 multiprocessors: some large steps have full turns
    monkeypatch.setattr(device_runner, "compiling_ahead", lambda *_: contextlib.nullcontext())
    with torch.inference_mode():
        launches.clear()
        runner.compile(1, lora=True, progress=lambda *_: None)
        ahead = set(launches)
        launches.clear()
        for number, spans in enumerate(steps(owners), 1):
            step(worker, number, spans)
    assert len(launches) > 50
    assert not launches - ahead

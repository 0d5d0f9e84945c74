"""What a step costs the host, without a device: planning, packing and committing 255 sequences of few or many adapters.

    python -m benchmarks.host_steps [--commit HASH] [--folder benchmarks/results] [--tiny]

S-LoRA's trace on the trace's engine, with a queue that never empties. The device waits where its step is shorter than
the three one after the other.
"""

import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.checkpoint import LLAMA_8B, TINY, write_checkpoint
from benchmarks.report import asked
from benchmarks.traffic import zipf
from benchmarks.whole import FULL as WHOLE
from engine.adapters.adapter import Hosted
from engine.config import EngineConfig
from engine.geometry import make_geometry
from engine.messages import Submit
from engine.models.registry import load_config
from engine.plan import SequenceResult, StepPlan, StepResult
from engine.scheduler import Scheduler, scheduler_config
from engine.types import SamplingParams
from engine.worker.accelerator import make_accelerator
from engine.worker.device_batch import Packer, no_edits
from engine.worker.device_runner import TAIL_INTS
from engine.worker.rows import make_rows
from engine.worker.shapes import Shapes, make_machine
from engine.worker.staging import Staging
from kernels.launch import narrow_items
from kernels.lora_meta import GROUP_STARTS
from kernels.step_meta import SAMPLE_INTS

MULTIPROCESSORS, CONTEXT, ITEMSIZE = 132, 2048, 2  # of a card, a server and bfloat16
PAGES, RANK, QUEUED = 7, 8, 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    model: Mapping[str, Any]
    engine: EngineConfig
    chunks: int = 40_000
    adapters: tuple[int, ...] = (5, 2000)
    longest: int = 512  # tokens of a prompt, and of an answer
    warm: int = 300
    steps: int = 400


FULL = Scale(model=LLAMA_8B, engine=msgspec.structs.replace(WHOLE.engine, **WHOLE.trace_engine))
SMALL = Scale(
    model=TINY, engine=msgspec.structs.replace(FULL.engine, max_running_requests=4, max_loras_per_batch=4),
    chunks=2000, adapters=(2, 5), longest=12, warm=3, steps=5,
)  # fmt: skip


@dataclass(slots=True)
class Timed:
    """Milliseconds of each part of the steps, of those behind `warm`."""

    warm: int
    step: int = 0
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, part: str, began: float) -> None:
        if self.step > self.warm:
            self.parts.setdefault(part, []).append((time.perf_counter() - began) * 1e3)


class Host:
    """A scheduler and what packs its plans; adapters are on the host, and a copy is done one step later."""

    def __init__(self, scale: Scale, adapters: int, folder: Path) -> None:
        config = scale.engine
        model = load_config(write_checkpoint(folder / str(adapters), scale.model))
        geometry = make_geometry(model.dims, ITEMSIZE)
        machine = make_machine(
            config, model, geometry, MULTIPROCESSORS, CONTEXT, config.chunked_prefill_size or CONTEXT
        )  # fmt: skip
        self.scheduler = Scheduler(
            scheduler_config(
                config, num_chunks=scale.chunks, block_tokens=geometry.block_tokens, chunk_bytes=geometry.chunk_bytes,
                max_model_len=CONTEXT, eos_token_ids=frozenset(), max_adapter_chunks=PAGES, on_gpu=True,
                max_host_pages=adapters * PAGES, unix_offset=0.0,
            )
        )  # fmt: skip
        self._names = [self._hosted(str(number)) for number in range(adapters)]
        self._rows = make_rows(machine.max_running, geometry.blocks(CONTEXT), torch.device("cpu"))
        self._packer, self._shapes = Packer(machine, self._rows, 0), Shapes(machine, None)
        largest = max(shape.layout.size for shape in self._shapes.largest())
        self._staging = Staging(make_accelerator(torch.device("cpu")), largest + TAIL_INTS)
        self._blocks = np.ones((machine.slots, len(GROUP_STARTS)), np.int32)

    def requests(self, longest: int) -> Iterator[Submit]:
        draw = random.Random(2)
        for number, name in enumerate(zipf(self._names, 1.0, seed=1), 1):
            params = SamplingParams(max_tokens=draw.randint(8, longest), seed=0, temperature=0.0, ignore_eos=True)
            prompt = [5] * draw.randint(8, longest)
            yield Submit(request_id=number, prompt=prompt, adapter_id=int(name), params=params)

    def pack(self, plan: StepPlan) -> None:
        """As the device's runner does."""
        for admission in plan.admissions:
            self._rows.admit(admission)
        for step in plan.sequences:
            self._rows.extend(step)
        adapted = plan.adapted_rows()
        shape = self._shapes.choose(
            plan.tokens, len(plan.sequences), lora=bool(adapted), narrow=narrow_items(adapted.values())
        )  # fmt: skip
        lines = np.zeros((sum(step.sample for step in plan.sequences), SAMPLE_INTS), np.int32)
        self._packer.pack(self._staging.begin(shape), shape, plan, self._blocks, lines, no_edits())

    def _hosted(self, name: str) -> str:
        """The adapter_id, as a name that the load may draw."""
        control = self.scheduler.adapters
        adapter_id = control.begin_load(name, name)[0].adapter_id
        control.make_host_room(adapter_id, PAGES)
        return str(control.host_done(adapter_id, Hosted(PAGES, RANK, ("q_proj",), name)))


def run(host: Host, scale: Scale) -> Timed:
    """One step ahead; a request comes for each step, beside those that wait already."""
    scheduler, requests, timed = host.scheduler, host.requests(scale.longest), Timed(scale.warm)
    flights, loads = deque[StepPlan](), deque[int]()
    for _ in range(QUEUED):
        scheduler.submit(next(requests), 0.0)
    while timed.step < scale.warm + scale.steps:
        timed.step += 1
        scheduler.submit(next(requests), 0.0)
        for _ in range(len(loads)):
            scheduler.adapters.load_done(loads.popleft(), 0.0)
        began = time.perf_counter()
        plan = scheduler.plan(0.0)
        scheduler.adapters.take_evicted()
        scheduler.take_fetches()
        timed.add("planning", began)
        if plan is not None:
            loads.extend(load.adapter_id for load in plan.loads)
            flights.append(plan)
        if plan is not None and plan.sequences:
            began = time.perf_counter()
            host.pack(plan)
            timed.add("packing", began)
        if len(flights) == 2 or plan is None:
            _commit(scheduler, flights.popleft(), timed)
    return timed


def _commit(scheduler: Scheduler, plan: StepPlan, timed: Timed) -> None:
    result = StepResult(plan.step, [SequenceResult([7] if step.sample else []) for step in plan.sequences], 0.0)
    began = time.perf_counter()
    scheduler.commit(result, 0.0)
    timed.add("committing", began)


def main(argv: Sequence[str] | None = None) -> None:
    report, tiny = asked("host-steps", __doc__, argv)
    scale = SMALL if tiny else FULL
    with tempfile.TemporaryDirectory() as folder:
        for adapters in scale.adapters:
            timed = run(Host(scale, adapters, Path(folder)), scale)
            for part, times in timed.parts.items():
                report.add(f"{part} a step, {adapters} adapters", "ms", times)


if __name__ == "__main__":
    main()

"""Decode steps of many adapters with a prompt beside them: their cost over the base's, by the tile of LoRA's items.

    python -m benchmarks.mixed_steps [--tile 16] [--commit HASH] [--folder benchmarks/results]

Llama-3.1-8B's shape, random weights, adapters of rank 8 on q, k, v and o as in S-LoRA's trace.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.device_timing import always, replaced
from benchmarks.gpu_cases import Bench, random_pages
from benchmarks.report import Report
from benchmarks.steps import FULL, start_worker
from engine.models.dims import LORA_MODULES
from engine.plan import StepPlan
from engine.worker import shapes
from engine.worker.worker import Worker

RANK, MODULES, CONTEXT = 8, LORA_MODULES[:4], 300
BATCH, ADAPTERS = 192, (0, 5, 80)
PROMPTS = (0, 200, 400, 700, 1800)  # tokens of the one that joins
STEPS, WARM_UP = 24, 6
ENGINE = msgspec.structs.replace(
    FULL.engine, max_loras_per_batch=128, max_lora_rank=RANK, lora_target_modules=MODULES, chunked_prefill_size=2048
)


@dataclass(slots=True)
class Timed:
    """Milliseconds of each step, and of them those in which the host prepared it."""

    whole: list[float]
    host: list[float]


def beside(bench: Bench, decodes: Sequence[StepPlan], prompt: int, adapters: int) -> list[StepPlan]:
    """The same steps with a prompt in each, that an adapter of the batch owns."""
    found = []
    for index, plan in enumerate(decodes):
        own = bench.prefills([prompt], 0)
        slot = index % adapters if adapters else -1
        admission = replace(own.admissions[0], row=BATCH)
        sequence = replace(own.sequences[0], row=BATCH, slot=slot)
        order = sorted((*plan.sequences, sequence), key=lambda s: (s.slot < 0, s.slot, s.length))
        found.append(replace(plan, admissions=(*plan.admissions, admission), sequences=tuple(order)))
    return found


def run(worker: Worker, plans: Sequence[StepPlan]) -> Timed:
    """One step ahead, as the engine does."""
    timed, pending, last = Timed([], []), [], 0.0
    for plan in plans:
        began = time.perf_counter()
        worker.forward(plan)
        pending.append(worker.sample(plan))
        timed.host.append((time.perf_counter() - began) * 1e3)
        if len(pending) > 1:
            pending.pop(0).result()
            now = time.perf_counter()
            timed.whole.append((now - last) * 1e3)
            last = now
    pending[0].result()
    return timed


def case(bench: Bench, report: Report, name: str, prompt: int, adapters: int) -> None:
    decodes = bench.decodes(BATCH, CONTEXT, STEPS + WARM_UP, adapters)
    timed = run(bench.worker, beside(bench, decodes, prompt, adapters) if prompt else decodes)
    host = statistics.median(timed.host[WARM_UP:])
    report.add(name, "ms/step", timed.whole[WARM_UP:], note=f"host {host:.2f} ms")


def measure(report: Report, name: str) -> None:
    worker = start_worker(report, FULL.model, ENGINE, name)
    bench = Bench(worker, ENGINE.max_loras_per_batch)
    for i in range(1, max(ADAPTERS) + 1):
        bench.load(i, random_pages(worker, RANK, MODULES))
    for prompt, adapters in itertools.product(PROMPTS, ADAPTERS):
        case(bench, report, f"{BATCH} rows, {adapters} adapters, prompt {prompt}, {name}", prompt, adapters)
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tile", type=int, help="rows of a work item in every step; by default what each step takes")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if arguments.tile is None:
        measure(Report("mixed-steps", arguments.commit, folder=arguments.folder), "default")
        return
    report = Report(f"mixed-steps-{arguments.tile}", arguments.commit, folder=arguments.folder)
    with replaced(always(arguments.tile), (shapes, "lora_tile")):
        measure(report, f"tile {arguments.tile}")


if __name__ == "__main__":
    main()

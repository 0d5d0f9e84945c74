"""What each way of overlapping is worth in a step of the worker, one process, one card: candidates beside each other.

    python -m benchmarks.ablation [--commit HASH] [--folder benchmarks/results]

Llama-3.1-8B's shape, random weights; but for other splits, candidates with the same products must leave the same
logits.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from benchmarks.device_timing import replaced
from benchmarks.gpu_cases import Bench, random_pages
from benchmarks.report import Report
from benchmarks.steps import FULL, start_worker, worker_floors
from engine.models.overlap import OFF, Overlap
from kernels import launch

STEPS, WARM_UP, CONTEXT = 40, 8, 564
ENGINE = msgspec.structs.replace(FULL.engine, disable_cuda_graph=True)
BASE = {
    "off": OFF,
    "pdl": Overlap(products=0),
    "products": Overlap(pdl=False),
    "not kept": Overlap(keep=0),
    "all": Overlap(),
    "off again": OFF,
}
LORA = {"off": OFF, "pdl": Overlap(products=0), "not kept": Overlap(keep=0), "all": Overlap(), "off again": OFF}
BASE_BATCHES = (1, 8, 16, 32, 64, 128)
LORA_CASES = ((8, 8, 16), (32, 8, 16), (64, 8, 16), (128, 8, 16), (64, 32, 16), (32, 8, 64))
FIRST = 0, 3, 4, 6  # modules of qkv, o, gate_up, down
SPLITS = {
    False: ((8, 8, 8, 8), (4, 8, 4, 16)),  # up to 48 tokens
    True: ((4, 4, 4, 4), (4, 8, 2, 8)),
}


class Candidates:
    """A worker whose steps are captured anew for each candidate."""

    def __init__(self, bench: Bench, report: Report) -> None:
        self.bench = bench
        bench._free.remove(0)  # a capture launches empty lists, which stores keys at its start
        self.report = report
        self.floors = worker_floors(bench.worker, replace(FULL, batches=BASE_BATCHES), report)
        self.runner: Any = bench.worker._runner
        self._wanted: dict[tuple[str, int], Tensor] = {}
        self._products = 0

    def use(self, overlap: Overlap, batches: Sequence[int], lora: bool) -> None:
        runner = self.runner
        runner._decoder.overlap(overlap)
        self._products = overlap.products
        shapes = [runner._shapes.make(b, b, prefill=False, lora=lora) for b in batches]
        with runner._accelerator.launching(), torch.inference_mode():
            runner._staging.device.zero_()
        with torch.inference_mode():
            runner._graphs.capture(shapes, lambda *_: None)

    def time(self, plans: Sequence[Any]) -> list[float]:
        times = []
        for _ in range(2):
            self.bench.run(plans[:WARM_UP])
            began = time.perf_counter()
            self.bench.run(plans[WARM_UP:])
            times.append((time.perf_counter() - began) / STEPS * 1e3)
        return times

    def case(
        self, name: str, candidate: str, plans: Sequence[Any], batch: int, used: int = 0, base: float = 0
    ) -> float:
        times = self.time(plans)
        logits = self.runner._sampler.logits[:batch].clone()
        same = torch.equal(self._wanted.setdefault((name, self._products), logits), logits)
        median = statistics.median(times)
        over = median / self.floors.step(batch, CONTEXT + WARM_UP + STEPS // 2, used)
        note = f"{over:.3f} x floor" + (f", {median / base:.3f} x base" if base else "")
        self.report.add(f"{name}: {candidate}", "ms/step", times, note=note + ("" if same else ", OTHER LOGITS"))
        return median


def attempt(run: Callable[[], float]) -> float:
    """A candidate that the device refuses is told and left out."""
    try:
        return run()
    except Exception as error:
        print(f"refused: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return float("inf")


def base(candidates: Candidates) -> dict[int, float]:
    """The default's step by batch."""
    plans = {b: candidates.bench.decodes(b, CONTEXT, STEPS + WARM_UP, 0, keep=True) for b in BASE_BATCHES}
    found: dict[int, float] = {}
    for name, overlap in BASE.items():

        def run(name: str = name, overlap: Overlap = overlap) -> float:
            candidates.use(overlap, BASE_BATCHES, lora=False)
            found.update({b: candidates.case(f"base {b}", name, plans[b], b) for b in BASE_BATCHES})
            return 0.0

        attempt(run)
    return found


def by_group(splits: Sequence[int]) -> Callable[[int, Any], int]:
    places = dict(zip(FIRST, splits, strict=True))
    return lambda tokens, group: places[group.first]


def lora(candidates: Candidates, bases: Mapping[int, float]) -> None:
    chunks: dict[int, tuple[int, ...]] = {}
    for rank in sorted({rank for *_, rank in LORA_CASES}):
        cases = [case for case in LORA_CASES if case[2] == rank]
        for adapter, own in chunks.items():
            candidates.bench.drop(adapter, own)
        pages = {i: random_pages(candidates.bench.worker, rank) for i in range(1, max(c[1] for c in cases) + 1)}
        chunks = {adapter: candidates.bench.load(adapter, own) for adapter, own in pages.items()}
        for batch, adapters, _ in cases:
            used = sum(pages[i].bytes for i in range(1, adapters + 1))
            lora_case(candidates, bases, batch, adapters, f"{adapters} x r{rank}, batch {batch}", used)


def lora_case(
    candidates: Candidates, bases: Mapping[int, float], batch: int, adapters: int, name: str, used: int
) -> None:
    plans = candidates.bench.decodes(batch, CONTEXT, STEPS + WARM_UP, adapters)

    def run(note: str, overlap: Overlap) -> float:
        candidates.use(overlap, [batch], lora=True)
        return candidates.case(name, note, plans, batch, used, bases[batch])

    for note, overlap in LORA.items():
        attempt(partial(run, note, overlap))
    for splits in SPLITS[batch > 48]:
        with replaced(by_group(splits), (launch, "shrink_splits")):
            attempt(partial(run, f"off, splits {splits}", OFF))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    report = Report("ablation", arguments.commit, folder=arguments.folder)
    worker = start_worker(report, FULL.model, ENGINE, "(none of them)")
    candidates = Candidates(Bench(worker, ENGINE.max_loras_per_batch), report)
    lora(candidates, base(candidates))


if __name__ == "__main__":
    main()

"""What each way of overlapping is worth in a step of the worker, one process, one card: candidates beside each other.

    python -m benchmarks.ablation [--commit HASH] [--folder benchmarks/results]

Llama-3.1-8B's shape, random weights; but for other splits, every candidate must leave the same logits.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from benchmarks.device_timing import always, replaced
from benchmarks.gpu_cases import Bench, HostPages, random_pages
from benchmarks.report import Report
from benchmarks.steps import FULL, pinned_copies, start_worker, worker_floors
from engine.models.overlap import MIB, OFF, Overlap
from kernels import attention_prefill, launch
from kernels.launch import AttentionTiles

STEPS, WARM_UP, CONTEXT = 40, 8, 564
ENGINE = msgspec.structs.replace(FULL.engine, disable_cuda_graph=True)
PDL = replace(OFF, pdl=True, pdl_joined=True, expand_pdl=True)


def rows(size: int, base: Overlap = OFF, **changes: Any) -> Overlap:
    return replace(base, **({"qkv": size, "o": size, "gate_up": size, "down": size} | changes))


BASE = {
    "off": OFF,
    "pdl": PDL,
    "fetch 8 MiB": rows(8 * MIB),
    "fetch 8 MiB, pdl": rows(8 * MIB, PDL),
    "fetch 16 MiB, pdl": rows(16 * MIB, PDL),
    "fetch 4 MiB, pdl": rows(4 * MIB, PDL),
    "fetch 8 MiB of columns, pdl": rows(8 * MIB, PDL, columns=True),
    "fetch 8 MiB, o 24, pdl": rows(8 * MIB, PDL, o=24 * MIB),
    "fetch 16 MiB, o 32, pdl": rows(16 * MIB, PDL, o=32 * MIB),
    "off again": OFF,
}
BASE_BATCHES = (1, 8, 32, 128)
LORA_CASES = ((8, 8, 16), (32, 8, 16), (64, 8, 16), (128, 8, 16), (64, 32, 16), (32, 8, 64))
FIRST = 0, 3, 4, 6  # modules of qkv, o, gate_up, down
PREFILLS = ((0, False, False), (8, False, False), (8, True, False), (8, True, True))  # adapters, expanded inside
SPLITS = {
    False: ((8, 16, 8, 16), (8, 8, 4, 16), (4, 8, 4, 16)),  # up to 48 tokens
    True: ((4, 8, 4, 8), (8, 8, 8, 8), (4, 8, 2, 8), (8, 8, 4, 16)),
}


class Candidates:
    """A worker whose steps are captured anew for each candidate."""

    def __init__(self, bench: Bench, report: Report) -> None:
        self.bench = bench
        self.report = report
        self.floors = worker_floors(bench.worker, replace(FULL, batches=(1, 8, 32, 64, 128)), report)
        self.runner: Any = bench.worker._runner
        self._wanted: dict[str, Tensor] = {}

    def use(self, overlap: Overlap, batches: Sequence[int], lora: bool) -> None:
        runner = self.runner
        runner._decoder.overlap(overlap)
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
        same = torch.equal(self._wanted.setdefault(name, logits), logits)
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


def base(candidates: Candidates) -> tuple[str, dict[int, float]]:
    """(the best candidate, its step by batch)."""
    plans = {b: candidates.bench.decodes(b, CONTEXT, STEPS + WARM_UP, 0) for b in (*BASE_BATCHES, 64)}
    found: dict[str, dict[int, float]] = {}
    for name, overlap in BASE.items():

        def run(name: str = name, overlap: Overlap = overlap) -> float:
            candidates.use(overlap, BASE_BATCHES, lora=False)
            found[name] = {b: candidates.case(f"base {b}", name, plans[b], b) for b in BASE_BATCHES}
            return 0.0

        attempt(run)
    worth = {n: sum(times[b] / found["off"][b] for b in BASE_BATCHES) for n, times in found.items() if n != "off again"}
    best = min(worth, key=lambda n: worth[n])
    print(f"best: {best}", flush=True)
    candidates.use(BASE[best], [64], lora=False)
    return best, found[best] | {64: candidates.case("base 64", best, plans[64], 64)}


def by_group(splits: Sequence[int]) -> Callable[[int, Any], int]:
    places = dict(zip(FIRST, splits, strict=True))
    return lambda tokens, group: places[group.first]


def lora(candidates: Candidates, best: Overlap, bases: dict[int, float]) -> None:
    settings = {
        "alone": replace(best, pdl=best.pdl, pdl_joined=False, expand_pdl=False, fetch_b=False),
        "joined": replace(best, pdl_joined=best.pdl, expand_pdl=False, fetch_b=False),
        "joined, expand": replace(best, pdl_joined=best.pdl, expand_pdl=True, fetch_b=False),
        "joined, expand, fetch b": replace(best, pdl_joined=best.pdl, expand_pdl=True, fetch_b=True),
        "expand, fetch b": replace(best, pdl_joined=False, expand_pdl=True, fetch_b=True),
        "fetch b": replace(best, pdl_joined=False, expand_pdl=False, fetch_b=True),
    }
    chunks: dict[int, tuple[int, ...]] = {}
    for rank in (16, 64):
        cases = [case for case in LORA_CASES if case[2] == rank]
        for adapter, own in chunks.items():
            candidates.bench.drop(adapter, own)
        pages = {i: random_pages(candidates.bench.worker, rank) for i in range(1, max(c[1] for c in cases) + 1)}
        chunks = {adapter: candidates.bench.load(adapter, own) for adapter, own in pages.items()}
        for batch, adapters, _ in cases:
            lora_case(
                candidates, settings, bases, batch, adapters, rank, sum(pages[i].bytes for i in range(1, adapters + 1))
            )
        if rank == 16:
            prefill(candidates, best)
            load(candidates, pages[1])


def lora_case(
    candidates: Candidates, settings: dict[str, Overlap], bases: dict[int, float], batch: int, adapters: int,
    rank: int, used: int,
) -> None:  # fmt: skip
    plans = candidates.bench.decodes(batch, CONTEXT, STEPS + WARM_UP, adapters)
    name = f"{adapters} x r{rank}, batch {batch}"

    def run(note: str, overlap: Overlap) -> float:
        candidates.use(overlap, [batch], lora=True)
        return candidates.case(name, note, plans, batch, used, bases[batch])

    found = {note: attempt(partial(run, note, overlap)) for note, overlap in settings.items()}
    chosen = min(found, key=lambda note: found[note])
    for splits in SPLITS[batch > 48]:
        with replaced(by_group(splits), (launch, "shrink_splits")):
            attempt(partial(run, f"{chosen}, splits {splits}", settings[chosen]))


def prefill(candidates: Candidates, best: Overlap) -> None:
    """8 x 1,024 tokens, one step."""
    short = AttentionTiles(128, 32, 4, 4)
    for tiles in (None, short):
        change: AbstractContextManager[None] = nullcontext()
        if tiles is not None:
            places = (attention_prefill, "prefill_tiles"), (launch, "prefill_tiles")
            change = replaced(always(tiles), *places)
        with change:
            for count, inside, norm in PREFILLS:
                candidates.runner._decoder.overlap(replace(best, expand_inside=inside, norm_inside=norm))
                rates = []
                for _ in range(4):
                    plan = candidates.bench.prefills([1024] * 8, count)
                    began = time.perf_counter()
                    candidates.bench.run([plan])
                    rates.append(8192 / (time.perf_counter() - began))
                what = f"prefill, {count} adapters, inside {inside} {norm}, tiles {tiles}"
                candidates.report.add(what, "tokens/s", rates[1:])


def load(candidates: Candidates, pages: HostPages) -> None:
    """Waiting for the copies in three ways, and the copies alone."""
    bench: Any = candidates.bench
    bank = bench.worker._bank
    plain = candidates.report.add("one pinned copy", "ms", pinned_copies(pages.bytes, "cuda")).median
    whole = bank._accelerator.event

    class Polled(torch.cuda.Event):
        def synchronize(self) -> None:
            while not self.query():  # type: ignore[no-untyped-call]
                time.sleep(2e-5)

    spun: Any = torch.cuda.Event
    polled: Any = Polled
    ways = {"sleeping": whole, "spinning": lambda **_: spun(), "polled": lambda **_: polled()}
    for name, event in ways.items():
        bank._accelerator.event = event
        times = []
        for _ in range(8):
            began = time.perf_counter()
            chunks = bench.load(1000, pages)
            times.append((time.perf_counter() - began) * 1e3)
            bench.drop(1000, chunks)
        candidates.report.add(f"load, {name}", "ms", times[2:], note=f"{statistics.median(times[2:]) / plain:.2f} x")
    del bank._accelerator.event
    copies(candidates, pages, bank, chunks)


def copies(candidates: Candidates, pages: HostPages, bank: Any, chunks: Sequence[int]) -> None:
    stream, done = torch.cuda.Stream(), torch.cuda.Event()  # type: ignore[no-untyped-call]
    issued, times, tables = [], [], []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.cuda.stream(stream), torch.inference_mode():
            for chunk, page in zip(chunks, pages.pages, strict=True):
                bank._bytes[chunk].copy_(page, non_blocking=True)
            done.record()
        issued.append((time.perf_counter() - began) * 1e3)
        done.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        found = bank._tables(chunks, pages.layout.places)
        tables.append((time.perf_counter() - began) * 1e3)
        with torch.cuda.stream(stream):
            for array in found:
                bank._accelerator.upload(array)
        stream.synchronize()
    candidates.report.add("scattered copies: issued", "ms", issued[2:])
    candidates.report.add("scattered copies: done", "ms", times[2:])
    candidates.report.add("tables on the host", "ms", tables[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    report = Report("ablation", arguments.commit, folder=arguments.folder)
    worker = start_worker(report, FULL.model, ENGINE)
    candidates = Candidates(Bench(worker, ENGINE.max_loras_per_batch), report)
    best, bases = base(candidates)
    lora(candidates, BASE[best], bases)


if __name__ == "__main__":
    main()

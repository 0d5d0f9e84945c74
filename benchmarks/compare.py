"""Step against step on one card, taking turns: LoRA idle against LoRA off, few slots against many, the gap between.

Run by `python -m benchmarks.gpu idle slots gap`. Workers of both sides live side by side, so that clocks and heat
are the same for both.
"""

import gc
import statistics
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from benchmarks.checkpoint import LLAMA_8B, TINY
from benchmarks.gpu_cases import Bench, random_pages
from benchmarks.report import Report
from benchmarks.steps import decode_times, start_worker
from engine.config import EngineConfig
from engine.worker.worker import Worker

PARTS = ("idle", "slots", "gap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """`config` is for one of several workers on a card: a small arena, few graphs."""

    model: Mapping[str, Any]
    config: EngineConfig
    context: int
    steps: int
    rounds: int
    idle_batches: tuple[int, ...]
    batch: int
    adapters: int
    rank: int
    slots: tuple[int, int]


FULL = Scale(
    model=LLAMA_8B,
    config=EngineConfig(
        load_format="dummy", context_length=1024, enable_lora=True, max_loras_per_batch=8, max_lora_rank=16,
        chunked_prefill_size=64, max_running_requests=32, max_total_tokens=45_000,
    ),
    context=520,
    steps=128,
    rounds=5,
    idle_batches=(1, 32),
    batch=32,
    adapters=8,
    rank=16,
    slots=(8, 64),
)  # fmt: skip
SMALL = Scale(
    model=TINY,
    config=EngineConfig(
        load_format="dummy", context_length=256, enable_lora=True, max_loras_per_batch=2, max_lora_rank=8,
        chunked_prefill_size=16, max_running_requests=4, max_total_tokens=2048, threads=1, device="cpu",
    ),
    context=20,
    steps=3,
    rounds=1,
    idle_batches=(1,),
    batch=2,
    adapters=2,
    rank=8,
    slots=(2, 4),
)  # fmt: skip


def run(parts: Collection[str], scale: Scale, report: Report) -> None:
    few, many = scale.slots
    with _bench(report, scale, f"{few} slots", max_loras_per_batch=few) as ours:
        if "idle" in parts:
            with _bench(report, scale, "LoRA off", enable_lora=False) as off:
                idle(ours, off, scale, report)
        _load([ours], scale)
        if "gap" in parts:
            gap(ours, scale, report)
        if "slots" in parts:
            with _bench(report, scale, f"{many} slots", max_loras_per_batch=many) as larger:
                _load([larger], scale)
                slots(ours, larger, scale, report)


@contextmanager
def _bench(report: Report, scale: Scale, name: str, **changes: Any) -> Iterator[Bench]:
    config = msgspec.structs.replace(scale.config, **changes)
    worker = start_worker(report, scale.model, config, f"({name})")
    bench = Bench(worker, config.max_loras_per_batch)
    yield bench
    worker.close()
    bench.worker = None  # type: ignore[assignment]  # its memory goes, whoever still holds the bench
    del worker
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load(benches: Collection[Bench], scale: Scale) -> None:
    for bench in benches:
        for adapter in range(1, scale.adapters + 1):
            bench.load(adapter, random_pages(bench.worker, scale.rank))


def idle(on: Bench, off: Bench, scale: Scale, report: Report) -> None:
    """The base alone, with and without LoRA enabled."""
    for batch in scale.idle_batches:
        _pair(report, scale, f"base, batch {batch}", batch, {"LoRA off": (off, 0), "LoRA on, idle": (on, 0)})


def slots(few: Bench, many: Bench, scale: Scale, report: Report) -> None:
    """The same batch of the same adapters."""
    sides = {f"{len(few.slots)} slots": (few, scale.adapters), f"{len(many.slots)} slots": (many, scale.adapters)}
    _pair(report, scale, f"{scale.adapters} adapters r{scale.rank}, batch {scale.batch}", scale.batch, sides)


def _pair(report: Report, scale: Scale, name: str, batch: int, sides: Mapping[str, tuple[Bench, int]]) -> None:
    """Turn by turn; the ratio is the second side's over the first's of the same turn."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(scale.rounds):
        for side, (bench, adapters) in sides.items():
            times[side].append(decode_times(bench, batch, scale.context, scale.steps, adapters))
    for side, values in times.items():
        report.add(f"{name}, {side}", "ms/step", values)
    (first, before), (second, after) = times.items()
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    report.add(f"{name}: {second} over {first}", "x", ratios)


def gap(bench: Bench, scale: Scale, report: Report) -> None:
    """What a step takes by the wall clock beyond its graphs' own time on the device: nothing computes meanwhile."""
    for name, adapters in (("base", 0), (f"{scale.adapters} adapters r{scale.rank}", scale.adapters)):
        walls, devices = [], []
        for _ in range(scale.rounds):
            walls.append(decode_times(bench, scale.batch, scale.context, scale.steps, adapters))
            if torch.cuda.is_available():
                devices.append(replay_time(bench.worker, scale.batch, lora=bool(adapters), count=scale.steps))
        if not devices:
            continue
        report.add(f"{name}, batch {scale.batch}, graphs replayed one behind the other", "ms/step", devices)
        shares = [(wall - device) / wall * 100 for wall, device in zip(walls, devices, strict=True)]
        report.add(f"{name}, batch {scale.batch}: gap between steps", "%", shares)
        report.add(f"{name}, batch {scale.batch}: step with gap", "ms/step", [statistics.median(walls)])


def replay_time(worker: Worker, batch: int, *, lora: bool, count: int) -> float:
    """Milliseconds of the device for the graphs of the step that ran last, one replay right behind the other."""
    runner: Any = worker._runner
    shape = runner._shapes.choose(batch, batch, lora=lora)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with runner._accelerator.launching():
        for number in range(count + 2):
            if number == 2:
                start.record()
            runner._graphs.forward(shape)
            runner._graphs.sample(shape)
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / count

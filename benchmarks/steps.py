"""Steps of the whole worker beside the card's floors: decode, prefill, LoRA, the load of an adapter, a profile.

Run by `python -m benchmarks.gpu`. Decode steps as in docs/performance.md: mean context 592, one step ahead.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm
from triton import knobs

from benchmarks.checkpoint import LLAMA_8B, TINY, write_checkpoint
from benchmarks.device_timing import synchronize, timed_by_host
from benchmarks.floors import TINY as TINY_FLOORS
from benchmarks.floors import Floors, Sizes, card_floors, random_matrices, take_floors
from benchmarks.gpu_cases import Bench, HostPages, adapter_layout, random_pages
from benchmarks.lived_in import LivedIn
from benchmarks.report import OVER_BASE, Report
from engine.adapters.device_bank import neighbours
from engine.config import EngineConfig
from engine.models.dims import LORA_MODULES
from engine.worker.worker import Worker

PARTS = ("decode", "prefill", "lora", "load", "profile")
LOAD_TURNS, LOADED = 12, 1000  # and the id of the adapter that is loaded
OTHERS = {8: 30, 16: 40, 32: 20, 64: 10}  # ranks of the adapters that came and went before a load, of a hundred


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the cases are."""

    model: Mapping[str, Any]
    engine: EngineConfig
    floors: Sizes
    batches: tuple[int, ...]
    steps: int
    context: int  # at the first measured step
    long_context: tuple[int, int]  # batch, context
    lora: tuple[tuple[int, int, int], ...]  # batch, adapters, rank
    prompts: int  # of a prefill, each as long as
    prompt_tokens: int
    runs: int = 3


FULL = Scale(
    model=LLAMA_8B,
    engine=EngineConfig(
        load_format="dummy", context_length=2048, enable_lora=True, max_loras_per_batch=32, max_lora_rank=64,
        chunked_prefill_size=8192, max_running_requests=256,
    ),
    floors=Sizes(),
    batches=(1, 8, 32, 64, 128),
    steps=128,
    context=520,  # the mean context of a case is 592
    long_context=(128, 1032),
    lora=((1, 1, 16), (8, 8, 16), (32, 8, 16), (64, 8, 16), (128, 8, 16), (32, 1, 16), (64, 32, 16), (32, 8, 64)),
    prompts=8,
    prompt_tokens=1024,
)  # fmt: skip
SMALL = Scale(
    model=TINY,
    engine=EngineConfig(
        load_format="dummy", context_length=256, enable_lora=True, max_loras_per_batch=4, max_lora_rank=16,
        chunked_prefill_size=64, max_running_requests=8, max_total_tokens=4096, threads=1, device="cpu",
    ),
    floors=TINY_FLOORS,
    batches=(1, 2),
    steps=3,
    context=20,
    long_context=(2, 40),
    lora=((1, 1, 8), (2, 2, 8), (2, 2, 16)),
    prompts=2,
    prompt_tokens=16,
    runs=1,
)  # fmt: skip


def start(report: Report, scale: Scale) -> Bench:
    """The worker of a scale, its arena full of keys and values of real spread."""
    worker = start_worker(report, scale.model, scale.engine)
    return Bench(worker, scale.engine.max_loras_per_batch)


def start_worker(report: Report, model: Mapping[str, Any], config: EngineConfig, name: str = "") -> Worker:
    folder = write_checkpoint(Path(tempfile.mkdtemp()) / "base", model)
    cached = ", kernels cached" if _any_kernels() else ""
    began = time.perf_counter()
    worker = Worker.start(msgspec.structs.replace(config, model_path=str(folder)), folder, progress=_progress())
    report.add(f"start, random weights, graphs{cached} {name}".rstrip(), "s", [time.perf_counter() - began])
    info = worker.info
    report.add(f"arena {name}".rstrip(), "GiB", [info.num_chunks * info.geometry.chunk_bytes / 2**30])
    with torch.inference_mode():
        worker._bank._arena.normal_(0.0, 0.5)  # type: ignore[attr-defined]
    synchronize()
    return worker


def _any_kernels() -> bool:
    """Whether Triton's cache holds some, so that a start does not compile all of its own."""
    folder = Path(knobs.cache.dir)
    return folder.is_dir() and any(folder.iterdir())


def run(parts: Collection[str], scale: Scale, report: Report, ready: Callable[[], None]) -> None:
    """`ready` is called when all is in place and time is measured next."""
    bench = start(report, scale)
    ready()
    floors = worker_floors(bench.worker, scale, report)
    if "decode" in parts:
        decode(bench, floors, scale, report)
    if "profile" in parts:
        profile(bench, scale, "base, batch 32", 32, 0)
    if "prefill" in parts:
        prefill(bench, scale, report, 0, 0)
    if "lora" in parts or "load" in parts:
        lora(bench, floors, scale, report, parts)


def worker_floors(worker: Worker, scale: Scale, report: Report) -> Floors:
    """On a GPU from the worker's own weights, so that the card holds them once."""
    if worker.info.device.startswith("cuda"):
        weights = worker._runner._decoder._weights  # type: ignore[attr-defined]
        linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        matrices = [*(linear.weight for linear in linears), weights.head]
    else:
        matrices = random_matrices(worker.info.dims)
    floors = take_floors(report, matrices, scale.batches, worker.info.dims, scale.floors)
    card_floors(report, scale.floors)
    return floors


def _progress() -> Callable[[str, int, int], None]:
    marks: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        began = marks.setdefault(stage, time.perf_counter())
        if done == total:
            tqdm.write(f"{stage}: {total} in {time.perf_counter() - began:.1f} s")

    return progress


def decode(bench: Bench, floors: Floors, scale: Scale, report: Report) -> None:
    for batch in scale.batches:
        _decode_case(bench, floors, scale, report, f"base, batch {batch}", batch, scale.context)
    batch, context = scale.long_context
    name = f"base, batch {batch}, context {context + scale.steps // 2 + 8}"
    _decode_case(bench, floors, scale, report, name, batch, context)


def lora(bench: Bench, floors: Floors, scale: Scale, report: Report, parts: Collection[str]) -> None:
    """Case by case, and what else asks for adapters while those of a rank are there."""
    chunks: dict[int, tuple[int, ...]] = {}
    ranks = sorted({rank for _, _, rank in scale.lora})
    for rank in ranks:
        cases = [case for case in scale.lora if case[2] == rank]
        for adapter, own in chunks.items():
            bench.drop(adapter, own)
        loaded = {i: random_pages(bench.worker, rank) for i in range(1, max(case[1] for case in cases) + 1)}
        chunks = {adapter: bench.load(adapter, pages) for adapter, pages in loaded.items()}
        for batch, adapters, _ in cases if "lora" in parts else ():
            used = sum(loaded[i].bytes for i in range(1, adapters + 1))
            name = f"{adapters} adapters r{rank}, batch {batch}"
            _decode_case(bench, floors, scale, report, name, batch, scale.context, adapters, used)
        if rank == ranks[0]:
            _with_adapters(bench, scale, report, parts, rank, loaded)


def _with_adapters(
    bench: Bench, scale: Scale, report: Report, parts: Collection[str], rank: int, loaded: Mapping[int, HostPages]
) -> None:
    adapters = min(8, len(loaded))
    if "profile" in parts:
        profile(bench, scale, f"{adapters} adapters r{rank}, batch 32", 32, adapters)
    if "prefill" in parts:
        prefill(bench, scale, report, adapters, rank)
    if "load" in parts:
        load(bench, loaded[1], rank, report)


def decode_times(bench: Bench, batch: int, context: int, steps: int, adapters: int) -> float:
    """Milliseconds of a step by the wall clock, one step ahead."""
    plans = bench.decodes(batch, context, steps + 8, adapters)
    bench.run(plans[:8])
    began = time.perf_counter()
    bench.run(plans[8:])
    return (time.perf_counter() - began) / steps * 1e3


def _decode_case(
    bench: Bench, floors: Floors, scale: Scale, report: Report, name: str, batch: int, context: int,
    adapters: int = 0, used: int = 0,
) -> None:  # fmt: skip
    """With adapters in turns with the base: a card at its power limit has another clock from one minute to the next."""
    times, bases = list[float](), list[float]()
    for _ in range(scale.runs):
        if adapters:
            bases.append(decode_times(bench, batch, context, scale.steps, 0))
        times.append(decode_times(bench, batch, context, scale.steps, adapters))
    floor = floors.step(batch, context + 8 + scale.steps // 2, used)
    ratio = statistics.median(times) / floor
    report.add(name, "ms/step", times, note=f"floor {floor:.3f}, {ratio:.3f} x")
    report.add(f"{name}: over the floor", "x", [time / floor for time in times])
    if adapters:
        note = f"base {statistics.median(bases):.3f} ms"
        ratios = [time / base for time, base in zip(times, bases, strict=True)]
        report.add(f"{name}{OVER_BASE}", "x", ratios, note=note)


def profile(bench: Bench, scale: Scale, name: str, batch: int, adapters: int) -> None:
    """Where the device's time goes in a decode step, by kernel."""
    steps = 4
    plans = bench.decodes(min(batch, scale.engine.max_running_requests), scale.context, steps + 2, adapters)
    bench.run(plans[:2])
    with torch.profiler.profile() as profiler:
        bench.run(plans[2:])
        synchronize()
    rows = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
    print(f"profile of {name}: kernel, launches a step, microseconds a step", flush=True)
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:14]:
        print(f"  {row.key[:70]:<70} {row.count / steps:>7.1f} {row.self_device_time_total / steps:>9.1f}", flush=True)


def prefill(bench: Bench, scale: Scale, report: Report, adapters: int, rank: int) -> None:
    """All prompts in one step, and in four."""
    count, length = scale.prompts, scale.prompt_tokens
    what = f"{adapters} adapters r{rank}" if adapters else "base"
    for at_once in (count, max(1, count // 4)):
        rates = []
        for _ in range(scale.runs + 1):
            plans = [bench.prefills([length] * at_once, adapters) for _ in range(count // at_once)]
            began = time.perf_counter()
            bench.run(plans)
            rates.append(count * length / (time.perf_counter() - began))
        report.add(f"prefill {count} x {length}, {what}, {at_once * length} a step", "tokens/s", rates[1:])


def load(bench: Bench, pages: HostPages, rank: int, report: Report) -> None:
    """One adapter from the host to the arena, beside one pinned copy of as many bytes, in turns.

    Its chunks are those that the engine's arena gives once requests and adapters came and went; and, for what scattered
    ones cost, any.
    """
    info = bench.worker.info
    host = torch.empty(pages.bytes, dtype=torch.uint8, pin_memory=info.device.startswith("cuda"))
    target = torch.empty_like(host, device=info.device)
    sizes = {adapter_layout(info.dims, bench.worker, other, LORA_MODULES).chunks: n for other, n in OTHERS.items()}
    arena = LivedIn(info.num_chunks, sizes)
    copies, loads, apart, runs = list[float](), list[float](), list[float](), list[int]()
    for _ in range(LOAD_TURNS + 2):
        copies.append(timed_by_host(lambda: target.copy_(host, non_blocking=True)))
        chunks = arena.load(len(pages.pages))
        runs.append(sum(1 for _ in neighbours(chunks, pages.pages)))
        loads.append(_timed_load(bench, chunks, pages))
        bench.worker.drop(LOADED)
        chunks = bench.free(len(pages.pages))
        apart.append(_timed_load(bench, chunks, pages))
        bench.drop(LOADED, chunks)
    report.add("pinned copy of the same bytes", "ms", copies[2:])
    name = f"adapter r{rank}, host to arena"
    for what, times, count in (
        (name, loads, statistics.mean(runs[2:])), (f"{name}, chunks apart", apart, len(pages.pages))
    ):  # fmt: skip
        report.add(what, "ms", times[2:], note=f"in {count:.1f} copies")
        ratios = [time / copy for time, copy in zip(times[2:], copies[2:], strict=True)]
        report.add(f"{what}: over the copy", "x", ratios)


def _timed_load(bench: Bench, chunks: tuple[int, ...], pages: HostPages) -> float:
    """Milliseconds until the adapter may be used."""
    began = time.perf_counter()
    bench.load_into(chunks, LOADED, pages)
    return (time.perf_counter() - began) * 1e3


def full(engine: EngineConfig) -> Scale:
    """The full scale on an engine of other sizes."""
    return replace(FULL, engine=engine)

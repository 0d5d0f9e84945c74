"""The worker on one GPU, Llama-3.1-8B's shape, random weights, bf16: steps and loads beside the card's floors.

    python -m benchmarks.gpu [--folder benchmarks/results] [--commit HASH] [part ...]

Parts: decode prefill lora load profile. Decode steps as in docs/performance.md: mean context 592, one step ahead.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.floors import Floors, Sizes, card_floors, take_floors
from benchmarks.gpu_cases import LLAMA_8B, Bench, HostPages, random_pages, write_config
from benchmarks.report import Report
from engine.config import EngineConfig
from engine.worker.worker import Worker

PARTS = ("decode", "prefill", "lora", "load", "profile")
BATCHES = (1, 8, 32, 64, 128)
STEPS, FIRST_CONTEXT = 128, 520  # the mean context of a case is 592
LORA_CASES = (  # batch, adapters, rank
    (1, 1, 16), (8, 8, 16), (32, 8, 16), (64, 8, 16), (128, 8, 16), (32, 1, 16), (64, 32, 16), (32, 8, 64),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--after", type=Path, help="measure when this file exists; until then only get ready")
    parser.add_argument("--mem-fraction", type=float, default=0.88)
    arguments = parser.parse_args()
    report = Report("gpu", arguments.commit)
    try:
        _run(arguments.parts or PARTS, arguments.slots, arguments.mem_fraction, report, arguments.after)
    finally:
        report.save(arguments.folder)


def _run(parts: Sequence[str], slots: int, share: float, report: Report, after: Path | None) -> None:
    bench = _start(report, slots, share)
    while after is not None and not after.exists():
        time.sleep(0.1)
    floors = _floors(bench.worker, report)
    if "decode" in parts:
        decode(bench, floors, report)
    if "profile" in parts:
        profile(bench, "base, batch 32", 32, 0)
    if "prefill" in parts:
        prefill(bench, report, 0)
    if "lora" in parts or "load" in parts:
        lora(bench, floors, report, parts)


def _floors(worker: Worker, report: Report) -> Floors:
    """On the worker's own weights, so that the card holds them once."""
    weights = worker._runner._decoder._weights  # type: ignore[attr-defined]
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    matrices = [*(linear.weight for linear in linears), weights.head]
    floors = take_floors(report, matrices, BATCHES, worker.info.dims, Sizes())
    card_floors(report, Sizes())
    return floors


def _start(report: Report, slots: int, share: float) -> Bench:
    """The worker with room for the largest prefill."""
    folder = write_config(Path(tempfile.mkdtemp()) / "llama-8b", LLAMA_8B)
    config = EngineConfig(
        load_format="dummy", context_length=2048, enable_lora=True, max_loras_per_batch=slots, max_lora_rank=64,
        chunked_prefill_size=8192, max_running_requests=256, mem_fraction_static=share,
    )  # fmt: skip
    began = time.perf_counter()
    worker = Worker.start(config, folder, progress=_progress())
    report.add("start, random weights, graphs", "s", [time.perf_counter() - began])
    info = worker.info
    report.add("arena", "GiB", [info.num_chunks * info.geometry.chunk_bytes / 2**30])
    with torch.inference_mode():
        worker._bank._arena.normal_(0.0, 0.5)  # type: ignore[attr-defined]  # keys and values of real spread
    torch.cuda.synchronize()
    return Bench(worker, slots)


def _progress() -> Callable[[str, int, int], None]:
    marks: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        began = marks.setdefault(stage, time.perf_counter())
        if done == total:
            tqdm.write(f"{stage}: {total} in {time.perf_counter() - began:.1f} s")

    return progress


def decode(bench: Bench, floors: Floors, report: Report) -> None:
    for batch in BATCHES:
        _decode_case(bench, floors, report, f"base, batch {batch}", batch, FIRST_CONTEXT)
    _decode_case(bench, floors, report, "base, batch 128, context 1104", 128, 1032)


def lora(bench: Bench, floors: Floors, report: Report, parts: Sequence[str]) -> None:
    loaded: dict[int, dict[int, HostPages]] = {}
    chunks: dict[int, tuple[int, ...]] = {}
    for rank in (16, 64):
        cases = [case for case in LORA_CASES if case[2] == rank]
        for adapter, own in chunks.items():
            bench.drop(adapter, own)
        chunks = {}
        for adapter in range(1, max(adapters for _, adapters, _ in cases) + 1):
            loaded.setdefault(rank, {})[adapter] = random_pages(bench.worker, rank)
            chunks[adapter] = bench.load(adapter, loaded[rank][adapter])
        for batch, adapters, _ in cases:
            used = sum(loaded[rank][i].bytes for i in range(1, adapters + 1))
            name = f"{adapters} adapters r{rank}, batch {batch}"
            _decode_case(bench, floors, report, name, batch, FIRST_CONTEXT, adapters, used)
        if rank == 16 and "profile" in parts:
            profile(bench, "8 adapters r16, batch 32", 32, 8)
        if rank == 16 and "prefill" in parts:
            prefill(bench, report, 8)
        if rank == 16 and "load" in parts:
            load(bench, loaded[rank][1], report)


def _decode_case(
    bench: Bench, floors: Floors, report: Report, name: str, batch: int, context: int, adapters: int = 0, used: int = 0
) -> None:
    """Wall time of a step, and the device's own time of one replay."""
    times = []
    for _ in range(3):
        plans = bench.decodes(batch, context, STEPS + 8, adapters)
        bench.run(plans[:8])
        began = time.perf_counter()
        bench.run(plans[8:])
        times.append((time.perf_counter() - began) / STEPS * 1e3)
    floor = floors.step(batch, context + STEPS // 2, used)
    ratio = statistics.median(times) / floor
    report.add(name, "ms/step", times, note=f"floor {floor:.3f}, {ratio:.3f} x")
    report.add(f"{name}: over the floor", "x", [time / floor for time in times])


def profile(bench: Bench, name: str, batch: int, adapters: int) -> None:
    """Where the device's time goes in a decode step, by kernel."""
    steps = 4
    plans = bench.decodes(batch, FIRST_CONTEXT, steps + 2, adapters)
    bench.run(plans[:2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        bench.run(plans[2:])
        torch.cuda.synchronize()
    rows = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
    print(f"profile of {name}: kernel, launches a step, microseconds a step", flush=True)
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:14]:
        print(f"  {row.key[:70]:<70} {row.count / steps:>7.1f} {row.self_device_time_total / steps:>9.1f}", flush=True)


def prefill(bench: Bench, report: Report, adapters: int) -> None:
    """8 prompts of 1,024 tokens, in steps of 8,192 and of 2,048 tokens."""
    for at_once in (8, 2):
        times = []
        for _ in range(4):
            plans = [bench.prefills([1024] * at_once, adapters) for _ in range(8 // at_once)]
            began = time.perf_counter()
            bench.run(plans)
            times.append(8192 / (time.perf_counter() - began))
        what = f"{adapters} adapters r16" if adapters else "base"
        report.add(f"prefill 8 x 1024, {what}, {at_once * 1024} a step", "tokens/s", times[1:])


def load(bench: Bench, pages: HostPages, report: Report) -> None:
    """One adapter from the host to the arena, beside one pinned copy of as many bytes."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        chunks = bench.load(1000, pages)
        times.append((time.perf_counter() - began) * 1e3)
        bench.drop(1000, chunks)
    host = torch.empty(pages.bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    copies = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        copies.append((time.perf_counter() - began) * 1e3)
    plain = report.add("pinned copy of the same bytes", "ms", copies)
    report.add(
        "adapter r16, host to arena", "ms", times, note=f"{statistics.median(times) / plain.median:.2f} x the copy"
    )


if __name__ == "__main__":
    main()

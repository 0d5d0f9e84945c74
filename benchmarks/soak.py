"""A long run of mixed traffic over adapters that come and go: no error that was not asked for, nothing left behind.

    python -m benchmarks.soak [--minutes 7] [--adapters 100] [--slots 8] [--tokens 32768] [--model-path FOLDER]

Base and adapters are asked while adapters are loaded and unloaded, over an arena too small for all of them. Every 50th
answer is greedy and is compared with the same adapter's answer alone, after the traffic and past the prefix cache; some
also with another model's, to see that the comparison would notice (see benchmarks.soak_judge).
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import Server, loramux, server_log
from benchmarks.report import Report
from benchmarks.soak_compare import Comparison, compare_alone
from benchmarks.soak_judge import FAR, MEAN, NEAR
from benchmarks.soak_traffic import Traffic, churn, client_loop, load, unload
from engine.models.registry import load_config
from engine.models.source import resolve_model
from tests.support.adapters import write_adapter

RANKS = (4, 8, 16, 32, 64)
ALPHA, EFFECT = 16, 0.8  # the delta of a unit input is about EFFECT, so that adapters answer differently
MODULES = (
    ("q_proj", "v_proj"),
    ("down_proj",),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
SETTLE_SECONDS = 30.0
FILES, MEMORY_MB, DEVICE_MB = 8, 512, 64  # what may grow; of the memory two slabs of the host tier
AT_REST = (  # 0 when nobody asks and nothing is loaded
    "requests_running", "requests_waiting", "slots_used", "adapters_resident", "chunks,kv", "chunks,adapter",
    "adapter_bytes,arena", "adapter_bytes,host",
)  # fmt: skip
TOTALS = (
    "evictions_total,arena", "evictions_total,prefix", "preemptions_total", "skips_total", "mixed_adapter_steps_total",
    "steps_total", "graph_replays_total", "prefix_hit_tokens_total", "failed_total", "request_generated_tokens_sum",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the server's processes hold."""

    files: int
    memory: float  # MB
    device: float  # MB of the accelerator in use, 0 without one


async def figures(http: httpx.AsyncClient) -> dict[str, float]:
    """Gauges and totals by name and, where it has one, use or tier; without the prefix."""
    found: dict[str, float] = collections.defaultdict(float)
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            labels = [value for label, value in sample.labels.items() if label in ("use", "tier")]
            found[",".join([sample.name.removeprefix("loramux_"), *labels])] += sample.value
    return dict(found)


def chunks(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("chunks,"))


async def at_rest(http: httpx.AsyncClient, traffic: Traffic, all_chunks: float) -> dict[str, float]:
    """Unloads everything and waits until the arena holds nothing but cached prefixes."""
    for name in sorted(traffic.served):
        await unload(http, traffic, name)
    end, left, now = time.monotonic() + SETTLE_SECONDS, ["?"], dict[str, float]()
    while left and time.monotonic() < end:
        await asyncio.sleep(0.5)
        now = await figures(http)
        left = [f"{name} {now[name]}" for name in AT_REST if now.get(name)]
        left += [f"{chunks(now)} of {all_chunks} chunks"] if chunks(now) != all_chunks else []
    if left:
        traffic.errors.append(f"left behind: {left}")
    return now


def write_adapters(folder: Path, model: Path, count: int) -> dict[str, Path]:
    dims = load_config(model).dims
    return {
        f"soak{i}": write_adapter(
            folder / f"soak{i}",
            dims,
            rank=rank,
            alpha=ALPHA,
            modules=MODULES[i % len(MODULES)],
            seed=i,
            std=EFFECT * rank**0.5 / ALPHA,
        )
        for i, rank in zip(range(count), itertools.cycle(RANKS))
    }


async def soak(server: Server, traffic: Traffic, arguments: argparse.Namespace, report: Report) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    seconds = arguments.minutes * 60
    async with httpx.AsyncClient(base_url=server.base_url, timeout=120, limits=limits) as http:
        all_chunks = chunks(await figures(http))
        for name in itertools.islice(traffic.sources, arguments.adapters // 2):
            await load(http, traffic, name)
        idle = footprint()
        warm = await _traffic(http, traffic, arguments, seconds)
        print(f"traffic over: {dict(traffic.counts)}, {len(traffic.errors)} errors", flush=True)
        found = await compare_alone(http, traffic, arguments.compare_seconds)
        metrics = await at_rest(http, traffic, all_chunks)
    await asyncio.sleep(1)  # the connections end
    _report_traffic(report, traffic, metrics, seconds)
    _report_comparison(report, found)
    traffic.errors += _report_growth(report, idle, warm, footprint())


async def _traffic(
    http: httpx.AsyncClient, traffic: Traffic, arguments: argparse.Namespace, seconds: float
) -> Footprint:
    """The footprint when a fifth of the time is over: what is allocated once is there by then."""
    until = time.monotonic() + seconds
    clients = [client_loop(http, traffic, seed, until) for seed in range(arguments.clients)]
    warm = asyncio.create_task(_footprint_after(seconds / 5))
    await asyncio.gather(churn(http, traffic, arguments.adapters // 2, until), *clients)
    return await warm


async def _footprint_after(seconds: float) -> Footprint:
    await asyncio.sleep(seconds)
    return footprint()


def footprint() -> Footprint:
    """Of all processes that this one started, and of the accelerator."""
    files, memory = 0, 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            files += process.num_fds()
            memory += process.memory_info().rss
    return Footprint(files, memory / 1e6, _device_memory())


def _device_memory() -> float:
    """MB in use on the first accelerator that this process may see; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(result.stdout) * 2**20 / 1e6 if result.returncode == 0 else 0.0


def _report_traffic(report: Report, traffic: Traffic, metrics: dict[str, float], seconds: float) -> None:
    report.add("soak: traffic", "s", [seconds])
    for name, count in sorted(traffic.counts.items()):
        report.add(f"soak: {name}", "times", [count])
    for name in TOTALS:
        report.add(f"soak: {name}", "times", [metrics.get(name, 0.0)])
    if metrics.get("engine_losses_total"):
        traffic.errors.append(f"the engine was lost {metrics['engine_losses_total']:.0f} times")


def _report_comparison(report: Report, found: Comparison) -> None:
    own, control = found.own, found.control
    report.add("soak: answers compared with the adapter alone", "answers", [len(own.verdicts)])
    report.add("soak: answers left out for want of time", "answers", [found.left_out], "= 0")
    report.add("soak: answers that differ", "answers", [own.wrong], "= 0", f"margin {NEAR}, mean {MEAN}, place {FAR}")
    report.add("soak: places compared", "tokens", [len(own.drifts)])
    report.add("soak: share of them that is a near tie", "", [own.near_share], note=f"margin <= {NEAR} nats")
    report.add("soak: answers that part at a near tie", "answers", [len(own.margins)])
    report.add("soak: largest margin where one parts", "nats", [max(own.margins, default=0.0)], f"<= {NEAR}")
    for name, tally in (("", own), (" to another model", control)):
        if tally.verdicts:
            means = [verdict.mean for verdict in tally.verdicts]
            report.add(f"soak: mean difference{name}, median of answers", "nats", [statistics.median(means)])
            report.add(f"soak: mean difference{name}, smallest", "nats", [min(means)])
            report.add(f"soak: mean difference{name}, largest", "nats", [max(means)], f"<= {MEAN}" if not name else "")
    if control.verdicts:
        share = control.wrong / len(control.verdicts)
        report.add("soak: another model's answers told apart", "", [share], ">= 0.8", f"of {len(control.verdicts)}")


def _report_growth(report: Report, idle: Footprint, warm: Footprint, after: Footprint) -> list[str]:
    """The bounds that were passed. Without an accelerator the arena counts as memory and grows as it is used."""
    grown: list[tuple[str, str, float, int]] = [
        ("open files, after less before the traffic", "files", after.files - idle.files, FILES)
    ]
    if after.device:
        grown += [
            ("memory, after less at a fifth of the time", "MB", after.memory - warm.memory, MEMORY_MB),
            ("device memory, after less at a fifth of the time", "MB", after.device - warm.device, DEVICE_MB),
        ]
    for name, unit, value, most in grown:
        report.add(f"soak: {name}", unit, [value], f"<= {most}")
    return [f"{name}: {value:.0f} {unit}" for name, unit, value, most in grown if value > most]


def logged_errors(log: Path, start: int) -> list[str]:
    """What the server wrote at level error, or as a traceback, from this byte of its log on."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return [line for line in lines if any(mark in line for mark in (" ERROR ", " CRITICAL ", "Traceback"))]


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768, help="cap of the arena, adapters included")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compare-seconds", type=float, default=3600.0, help="what is not compared by then is counted")
    parser.add_argument("--model-path", help="default: the demo")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    report = Report("soak", arguments.commit)
    model = resolve_model(arguments.model_path, None)
    log = server_log()
    start = log.stat().st_size if log.exists() else 0
    with tempfile.TemporaryDirectory() as folder:
        traffic = Traffic("llama", write_adapters(Path(folder), model, arguments.adapters))
        flags = ["--model-path", str(model), "--served-model-name", "llama", "--enable-lora"]
        flags += ["--max-loras-per-batch", str(arguments.slots), "--max-lora-rank", str(max(RANKS))]
        async with loramux(*flags, "--max-total-tokens", str(arguments.tokens), threads=arguments.threads) as server:
            report.add("soak: start of the server", "s", [server.seconds_to_ready])
            try:
                await soak(server, traffic, arguments, report)
            except httpx.HTTPError as error:
                traffic.errors.append(f"{type(error).__name__}: {error}")
    traffic.errors += logged_errors(log, start)
    report.add("soak: errors", "times", [len(traffic.errors)], "= 0")
    for text in traffic.errors[:20]:
        print(text, file=sys.stderr)
    report.save(arguments.folder)
    return 1 if traffic.errors else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

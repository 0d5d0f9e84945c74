"""What running streams notice of adapters that are loaded beside them: `python -m benchmarks.load_pause`.

Streams decode for the whole time; the gaps between their tokens are taken without loads, then while made adapters come
from disk to the host and into the arena (each is loaded pinned, then unpinned), then without loads again.
"""

import argparse
import asyncio
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.load import Job, random_jobs
from benchmarks.processes import loramux
from benchmarks.report import Report
from engine.models.dims import LORA_MODULES, ModelDims
from engine.models.registry import load_config
from engine.models.source import resolve_model

STREAMS = 8
MODELS = ("llama", "llama:lora0", "llama:lora1", "llama:lora2", "llama:lora3")
PROMPT, OUTPUT = (32, 32), (900, 900)
AT_ONCE = 3  # loads under way; each is pinned until it is in the arena
MAX_RATIO, MAX_STEPS = 1.5, 2.0


def make_adapter(folder: Path, dims: ModelDims, rank: int, seed: int) -> Path:
    """A PEFT adapter of random weights on all modules; returns the folder."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer, module in itertools.product(range(dims.layers), LORA_MODULES):
        inputs, outputs = dims.module_shape(module)
        part = "self_attn" if module in LORA_MODULES[:4] else "mlp"
        name = f"base_model.model.model.layers.{layer}.{part}.{module}"
        tensors[f"{name}.lora_A.weight"] = draw.standard_normal((rank, inputs), np.float32) / math.sqrt(inputs)
        tensors[f"{name}.lora_B.weight"] = draw.standard_normal((outputs, rank), np.float32) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LORA_MODULES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass(slots=True)
class Gaps:
    """When each stream's tokens came, in seconds of one clock; all streams together."""

    times: list[list[float]] = field(default_factory=list)

    def between(self, start: float, end: float) -> list[float]:
        """Gaps that ended in this span, sorted."""
        return sorted(
            b - a for times in self.times for a, b in itertools.pairwise(times) if start <= a and b <= end
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phase:
    """The gaps of one span, in milliseconds."""

    median: float
    p99: float
    largest: float
    count: int

    @classmethod
    def of(cls, gaps: Sequence[float]) -> "Phase":
        """`gaps` in seconds, sorted."""
        return cls(
            1e3 * statistics.median(gaps), 1e3 * gaps[math.ceil(0.99 * len(gaps)) - 1], 1e3 * gaps[-1], len(gaps)
        )


@dataclass(frozen=True, slots=True)
class Spans:
    before: tuple[float, float]
    loads: tuple[float, float]
    after: tuple[float, float]


async def stream(client: httpx.AsyncClient, job: Job, gaps: Gaps, ready: asyncio.Event) -> None:
    """Reads one answer for as long as it lasts, or until it is cancelled."""
    times: list[float] = []
    gaps.times.append(times)
    body = {
        "model": job.model, "prompt": list(job.prompt), "max_tokens": job.output, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                ready.set()


async def load_all(client: httpx.AsyncClient, folders: Sequence[Path]) -> float:
    """Seconds until every adapter went from disk through the host into the arena."""
    waiting = asyncio.Semaphore(AT_ONCE)

    async def load(folder: Path) -> None:
        async with waiting:
            body = {"lora_name": folder.name, "lora_path": str(folder), "pinned": True}
            (await client.post("/load_lora_adapter", json=body)).raise_for_status()
            (await client.post("/unpin_lora_adapter", json={"lora_name": folder.name})).raise_for_status()

    start = time.perf_counter()
    await asyncio.gather(*(load(folder) for folder in folders))
    return time.perf_counter() - start


async def measure(client: httpx.AsyncClient, folders: Sequence[Path], quiet: float, vocab: int) -> tuple[Gaps, Spans]:
    """Streams over base and adapters, with the loads in the middle."""
    gaps = Gaps()
    jobs = random_jobs(list(MODELS), STREAMS, PROMPT, OUTPUT, vocab, seed=3)
    ready = [asyncio.Event() for _ in jobs]
    tasks = [asyncio.create_task(stream(client, job, gaps, seen)) for job, seen in zip(jobs, ready, strict=True)]
    try:
        await asyncio.gather(*(seen.wait() for seen in ready))
        await asyncio.sleep(1.0)  # the streams' adapters have become one stack by then
        begin = time.perf_counter()
        await asyncio.sleep(quiet)
        first = time.perf_counter()
        await load_all(client, folders)
        last = time.perf_counter()
        await asyncio.sleep(quiet)
        end = time.perf_counter()
        if any(task.done() for task in tasks):
            raise RuntimeError("a stream ended before the loads did; give it more tokens or fewer loads")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return gaps, Spans((begin, first), (first, last), (last, end))


def tell(report: Report, gaps: Gaps, spans: Spans, count: int) -> bool:
    """Rows of both phases; whether the loads kept to the bounds."""
    calm = Phase.of(sorted(gaps.between(*spans.before) + gaps.between(*spans.after)))
    loud = Phase.of(gaps.between(*spans.loads))
    seconds = spans.loads[1] - spans.loads[0]
    report.add(f"{count} loads, disk to arena", "s", [seconds], note=f"{count / seconds:.1f} a second")
    for name, phase in (("without loads", calm), ("while adapters load", loud)):
        report.add(f"gap {name}: median", "ms", [phase.median], note=f"{phase.count} gaps")
        report.add(f"gap {name}: 99th percentile", "ms", [phase.p99])
        report.add(f"gap {name}: largest", "ms", [phase.largest], note=f"{phase.largest / calm.median:.2f} steps")
    ratio = loud.p99 / calm.p99
    report.add("99th percentile, with loads over without", "x", [ratio], f"<= {MAX_RATIO}")
    report.add("largest gap while adapters load", "steps", [loud.largest / calm.median], f"<= {MAX_STEPS}")
    return ratio <= MAX_RATIO and loud.largest <= MAX_STEPS * calm.median


async def run(args: argparse.Namespace) -> None:
    config = load_config(resolve_model(args.model_path))
    model = () if args.model_path is None else ("--model-path", args.model_path)
    with tempfile.TemporaryDirectory() as folder:
        made = [
            make_adapter(Path(folder) / f"made{index:02}", config.dims, args.rank, index) for index in range(args.loads)
        ]
        flags = ("--served-model-name", "llama", "--max-lora-rank", str(max(args.rank, 64)), *args.flags)
        async with (
            loramux(*model, *flags, threads=args.threads) as server,
            httpx.AsyncClient(base_url=server.base_url, timeout=600) as client,
        ):
            gaps, spans = await measure(client, made, args.quiet, config.dims.vocab)
    report = Report("load-pause-cpu", args.commit)
    tell(report, gaps, spans, args.loads)
    print(f"kept as {report.save(args.out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help="a model with adapters lora0 to lora3 (default: the demo)")
    parser.add_argument("--loads", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quiet", type=float, default=8.0, help="seconds without loads, before and after them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("flags", nargs="*", help="further flags of the server, behind --")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()

"""What running streams notice of adapters that are loaded beside them: `python -m benchmarks.load_pause`.

Streams decode for the whole time, each one long answer; once all of them run steadily, the gaps between their tokens
are taken without loads, then while made adapters come from disk to the host and into the arena (each is loaded pinned,
then unpinned), then without loads again, and so on for a few turns. A turn's loads are compared with the two spans
around them.
"""

import argparse
import asyncio
import gc
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.processes import loramux
from benchmarks.report import Report
from engine.models.dims import LORA_MODULES, ModelDims
from engine.models.registry import load_config
from engine.models.source import resolve_model

MODELS = ("llama", "llama:lora0", "llama:lora1", "llama:lora2", "llama:lora3")
TOPICS = ("bread", "bridges", "the sea", "chess", "gardens", "railways", "the moon", "paper")  # of one stream each
OUTPUT = 6000  # tokens of an answer: none ends while gaps are taken
STEADY = 100  # tokens that every stream has had when the first gap is taken
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
    """When the tokens of each answer came, in seconds of one clock; all streams together."""

    times: list[list[float]] = field(default_factory=list)
    shared: int = 0  # events of several tokens: a character that is whole with the last of them

    def between(self, start: float, end: float) -> list[float]:
        """Gaps that ended in this span, sorted."""
        return sorted(
            b - a for times in self.times for a, b in itertools.pairwise(times) if start <= a and b <= end
        )  # fmt: skip

    def event(self, times: list[float], now: float, total: int) -> None:
        """An answer has `total` tokens now; those of one event came at even distances since the one before."""
        new = total - len(times)
        before = times[-1] if times else now
        self.shared += new > 1
        times.extend(before + (now - before) * (index + 1) / new for index in range(new))


@dataclass(frozen=True, slots=True)
class Phase:
    """The gaps of one span, in milliseconds."""

    median: float
    p99: float
    largest: float
    count: int
    above: int  # gaps longer than two steps

    @classmethod
    def of(cls, gaps: Sequence[float], step: float | None = None) -> "Phase":
        """`gaps` in seconds, sorted; a step takes `step` milliseconds, by default the median gap."""
        median, count = 1e3 * statistics.median(gaps), len(gaps)
        above = sum(1e3 * gap > MAX_STEPS * (step or median) for gap in gaps)
        return cls(median, 1e3 * gaps[math.ceil(0.99 * count) - 1], 1e3 * gaps[-1], count, above)


@dataclass(frozen=True, slots=True)
class Spans:
    """One turn. What came before it and what comes after is without loads."""

    before: tuple[float, float]
    loads: tuple[float, float]
    after: tuple[float, float]


async def stream(client: httpx.AsyncClient, model: str, topic: str, gaps: Gaps, steady: asyncio.Event) -> None:
    """Reads one answer until it is cancelled. Raises RuntimeError where the answer ends before."""
    body = {
        "model": model, "prompt": f"A long and detailed account of {topic}, in plain English.\n\n",
        "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"continuous_usage_stats": True},
    }  # fmt: skip
    times: list[float] = []
    gaps.times.append(times)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                gaps.event(times, time.perf_counter(), orjson.loads(line[6:])["usage"]["completion_tokens"])
                if len(times) >= STEADY:
                    steady.set()
    raise RuntimeError("an answer ended before the loads did")


async def post(client: httpx.AsyncClient, path: str, **body: object) -> None:
    (await client.post(path, json=body)).raise_for_status()


async def load_all(client: httpx.AsyncClient, folders: Sequence[Path]) -> None:
    """Returns when every adapter went from disk through the host into the arena."""
    waiting = asyncio.Semaphore(AT_ONCE)

    async def load(folder: Path) -> None:
        async with waiting:
            await post(client, "/load_lora_adapter", lora_name=folder.name, lora_path=str(folder), pinned=True)
            await post(client, "/unpin_lora_adapter", lora_name=folder.name)

    await asyncio.gather(*(load(folder) for folder in folders))


async def unload_all(client: httpx.AsyncClient, folders: Sequence[Path]) -> None:
    for folder in folders:
        await post(client, "/unload_lora_adapter", lora_name=folder.name)


async def first_token(client: httpx.AsyncClient, folder: Path) -> float:
    """Milliseconds to load an adapter and have one token of it; it is unloaded again."""
    start = time.perf_counter()
    await post(client, "/load_lora_adapter", lora_name=folder.name, lora_path=str(folder))
    await post(client, "/v1/completions", model=folder.name, prompt=[1] * 32, max_tokens=1)
    taken = time.perf_counter() - start
    await unload_all(client, [folder])
    return 1e3 * taken


@dataclass(slots=True)
class Measured:
    gaps: Gaps = field(default_factory=Gaps)
    turns: list[Spans] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)  # first token of a cold adapter, nothing else running, ms
    busy: list[float] = field(default_factory=list)  # the same beside the streams, ms


async def measure(client: httpx.AsyncClient, folders: Sequence[Path], quiet: float, turns: int) -> Measured:
    """Streams over base and adapters; without loads, with them, without them, ..., without them."""
    measured = Measured()
    measured.idle = [await first_token(client, folder) for folder in folders[: turns + 1]][1:]  # one to warm up
    steady = [asyncio.Event() for _ in TOPICS]
    tasks = [
        asyncio.create_task(stream(client, model, topic, measured.gaps, event))
        for model, topic, event in zip(itertools.cycle(MODELS), TOPICS, steady, strict=False)
    ]
    turning = asyncio.create_task(_turns(client, folders, quiet, turns, steady, measured))
    try:
        done, _ = await asyncio.wait((turning, *tasks), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (turning, *tasks):
            task.cancel()
        await asyncio.gather(turning, *tasks, return_exceptions=True)
    return measured


async def _turns(
    client: httpx.AsyncClient, folders: Sequence[Path], quiet: float, turns: int, steady: Sequence[asyncio.Event],
    measured: Measured,
) -> None:  # fmt: skip
    await asyncio.gather(*(event.wait() for event in steady))
    calm = await _calm(quiet)
    for turn in range(turns):
        first = time.perf_counter()
        await load_all(client, folders)
        last = time.perf_counter()
        await unload_all(client, folders)
        measured.busy.append(await first_token(client, folders[turn]))
        before, calm = calm, await _calm(quiet)
        measured.turns.append(Spans(before, (first, last), calm))


async def _calm(seconds: float) -> tuple[float, float]:
    """A span without loads."""
    await asyncio.sleep(1.0)  # what came before is over by then
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    return start, time.perf_counter()


def tell(report: Report, measured: Measured, count: int) -> bool:
    """Rows of both phases, a value for each turn; whether the loads kept to the bounds."""
    between = measured.gaps.between
    calm = [Phase.of(sorted(between(*s.before) + between(*s.after))) for s in measured.turns]
    loud = [Phase.of(between(*s.loads), calm[turn].median) for turn, s in enumerate(measured.turns)]
    seconds = [end - start for start, end in (spans.loads for spans in measured.turns)]
    report.add(f"{count} loads, disk to arena", "s", seconds, note=f"{count / statistics.median(seconds):.1f} a second")
    for name, phases in (("without loads", calm), ("while adapters load", loud)):
        gaps = sum(phase.count for phase in phases)
        report.add(f"gap {name}: median", "ms", [phase.median for phase in phases], note=f"{gaps} gaps")
        report.add(f"gap {name}: 99th percentile", "ms", [phase.p99 for phase in phases])
        report.add(f"gap {name}: largest", "ms", [phase.largest for phase in phases])
        report.add(f"gap {name}: share above two steps", "%", [100 * p.above / p.count for p in phases])
    for name, taken in (("nothing else running", measured.idle), ("beside the streams", measured.busy)):
        if taken:
            report.add(f"a cold adapter's first token, {name}", "ms", taken)
    pairs = list(zip(calm, loud, strict=True))
    report.add(
        "largest gap without loads", "steps", [quiet.largest / quiet.median for quiet in calm],
        note=f"{measured.gaps.shared} events of several tokens in the whole run",
    )  # fmt: skip
    ratio = report.add(
        "99th percentile, with loads over without", "x", [with_.p99 / quiet.p99 for quiet, with_ in pairs],
        f"<= {MAX_RATIO}",
    )  # fmt: skip
    largest = report.add(
        "largest gap while adapters load", "steps", [with_.largest / quiet.median for quiet, with_ in pairs],
        f"<= {MAX_STEPS}",
    )  # fmt: skip
    return ratio.median <= MAX_RATIO and max(largest.values) <= MAX_STEPS


async def run(args: argparse.Namespace) -> None:
    config = load_config(resolve_model(args.model_path))
    model = () if args.model_path is None else ("--model-path", args.model_path)
    with tempfile.TemporaryDirectory() as folder:
        made = [
            make_adapter(Path(folder) / f"made{index:02}", config.dims, args.rank, index) for index in range(args.loads)
        ]
        os.sync()  # or the system writes them to the disk, on the same cores, half a minute later
        flags = ("--served-model-name", "llama", "--max-lora-rank", str(max(args.rank, 64)), *args.flags)
        gc.collect()
        gc.freeze()  # or the client stands still for a fifth of a second whenever it looks through its modules
        async with (
            loramux(*model, *flags, threads=args.threads) as server,
            httpx.AsyncClient(base_url=server.base_url, timeout=600) as client,
        ):
            measured = await measure(client, made, args.quiet, args.turns)
    report = Report("load-pause-cpu", args.commit)
    tell(report, measured, args.loads)
    print(f"kept as {report.save(args.out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help="a model with adapters lora0 to lora3 (default: the demo)")
    parser.add_argument("--loads", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quiet", type=float, default=8.0, help="seconds without loads, before and after them")
    parser.add_argument("--turns", type=int, default=3, help="how often the loads are made")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("flags", nargs="*", help="further flags of the server, behind --")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()

"""A server over HTTP under load: requests arrive as they do, and streams are timed as their clients see them.

    python -m benchmarks.online [--base-url http://host:port --models NAME ...] [--commit HASH] [--tiny]

Without --base-url a loramux server of random weights and adapters is started. With it any OpenAI-compatible server is
measured by the same client and the same load: its served names of the adapters follow --models.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.checkpoint import LLAMA_8B, TINY, write_checkpoint
from benchmarks.clients import HttpTarget
from benchmarks.driving import Outcome, at_once, at_times, in_turn, percentile
from benchmarks.load import Job
from benchmarks.processes import loramux
from benchmarks.report import SHORT, Report
from benchmarks.traffic import Lengths, arrival_times, make_jobs, staggered, until, zipf


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    model: Mapping[str, Any]
    flags: tuple[str, ...]
    adapters: int = 8
    rank: int = 16
    prompt: int = 128
    output: int = 128
    alpha: float = 1.0  # of the adapters' popularity
    share: float = 0.7  # of the capacity that arrives
    streams: int = 256  # for the capacity
    warm: float = 4.0  # seconds before what counts
    seconds: float = 12.0
    runs: Sequence[tuple[str, float]] = (("Poisson", 1.0), ("Gamma cv 2", 2.0))


FULL = Online(
    model=LLAMA_8B,
    flags=("--context-length", "2048", "--max-lora-rank", "16", "--max-loras-per-batch", "8", "--disable-radix-cache"),
)
SMALL = Online(
    model=TINY,
    flags=(
        "--context-length", "256", "--max-lora-rank", "8", "--max-loras-per-batch", "2", "--disable-radix-cache",
        "--device", "cpu", "--max-total-tokens", "4096", "--max-host-lora-bytes", "64M",
    ),
    adapters=2, rank=8, prompt=8, output=24, streams=4, warm=0.3, seconds=0.7, runs=(("Poisson", 1.0),),
)  # fmt: skip


async def online(target: HttpTarget, models: Sequence[str], vocab: int, scale: Online, report: Report) -> None:
    """Capacity, then each kind of arrivals at a share of it, each beside the pure decode step of its batch."""
    lengths = Lengths((scale.prompt, scale.prompt), (scale.output, scale.output), vocab)
    capacity = await _capacity(target, _jobs(models, lengths, scale, 1), scale, report)
    for name, cv in scale.runs:
        rate, seconds = scale.share * capacity, scale.warm + scale.seconds
        arrivals = until(seconds, arrival_times(rate, cv, seed=3), _jobs(models, lengths, scale, 2))
        outcome = await at_times(target, arrivals, seconds)
        what = f"online, {name}, {scale.share:.0%} load"
        _told(report, what, outcome, scale, len(arrivals) / seconds)
        streams = max(1, round(outcome.streams(scale.warm)))
        step = await _pure_step(target, _jobs(models, lengths, scale, 4), streams, scale)
        report.add(f"{what}: gap of {streams} streams that only decode", "ms", [step])
        gap = statistics.median(outcome.gaps(scale.warm))
        report.add(f"{what}: median gap over the pure decode step of its batch", "x", [gap / step])


def _jobs(models: Sequence[str], lengths: Lengths, scale: Online, seed: int) -> Iterator[Job]:
    return make_jobs(zipf(models, scale.alpha, seed), lengths, seed)


async def _capacity(target: HttpTarget, jobs: Iterator[Job], scale: Online, report: Report) -> float:
    """Requests a second of many streams in turn."""
    outcome = await in_turn(target, staggered(jobs, scale.streams), scale.streams, scale.warm + scale.seconds)
    rate = outcome.rate(scale.warm)
    report.add(f"online, {scale.streams} streams in turn", "requests/s", [rate])
    report.add("online, the same, tokens in + out", "tokens/s", [outcome.tokens_per_second(scale.warm)])
    report.add("online, the same, median gap", "ms", [statistics.median(outcome.gaps(scale.warm))])
    return rate


def _told(report: Report, what: str, outcome: Outcome, scale: Online, offered: float) -> None:
    gaps, firsts = outcome.gaps(scale.warm), outcome.first_tokens(scale.warm)
    report.add(f"{what}: requests", "1/s", [outcome.rate(scale.warm)], note=f"{offered:.2f} offered")
    report.add(f"{what}: tokens in + out", "tokens/s", [outcome.tokens_per_second(scale.warm)])
    for name, values in (("time to first token", firsts), ("inter-token latency", gaps)):
        report.add(f"{what}: {name}, median", "ms", [statistics.median(values)])
        report.add(f"{what}: {name}, 99th percentile", "ms", [percentile(values, 0.99)])
    each = [(a.end - a.first) * 1e3 / (a.tokens - 1) for a in outcome.complete(scale.warm)]
    report.add(f"{what}: milliseconds a token behind the first", "ms", [statistics.median(each)])


async def _pure_step(target: HttpTarget, jobs: Iterator[Job], streams: int, scale: Online) -> float:
    """The median gap while exactly so many streams decode and no prompt is computed."""
    outcome = await at_once(target, list(itertools.islice(jobs, streams)))
    first = max(answer.first for answer in outcome.answers) - outcome.start
    last = min(answer.end for answer in outcome.answers) - outcome.start
    return statistics.median(outcome.gaps(first, last))


@contextlib.asynccontextmanager
async def own_server(scale: Online, threads: int) -> AsyncIterator[tuple[str, list[str]]]:
    """(URL, models) of a loramux server of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "base", scale.model)
        names = [f"a{i}" for i in range(scale.adapters)]
        paths = [f"{name}=random-{scale.rank}-all-{i}" for i, name in enumerate(names)]
        flags = ("--model-path", str(path), "--served-model-name", "llama", "--load-format", "dummy", *scale.flags)
        lora = ("--lora-target-modules", "all", "--lora-paths", *paths)
        async with loramux(*flags, *lora, threads=threads) as server:
            yield server.base_url, [f"llama:{name}" for name in names]


async def run(scale: Online, report: Report, threads: int = 1) -> None:
    """Against a server of our own."""
    async with own_server(scale, threads) as (url, models):
        await against(url, models, scale, report)


async def against(url: str, models: Sequence[str], scale: Online, report: Report, api_key: str = "") -> None:
    """Against whoever answers at `url` for these models, the most popular first."""
    target = HttpTarget(url, lambda model: model, api_key)
    try:
        await online(target, models, int(scale.model["vocab_size"]), scale, report)
    finally:
        target.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="of a server that runs already")
    parser.add_argument("--models", nargs="*", default=[], help="its models, the most popular first")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--name", default="online", help="of the report")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="the short form: shows that it runs")
    arguments = parser.parse_args(argv)
    name = arguments.name + SHORT if arguments.tiny else arguments.name
    scale, report = SMALL if arguments.tiny else FULL, Report(name, arguments.commit, folder=arguments.folder)
    if arguments.base_url is None:
        uvloop.run(run(scale, report))
    elif arguments.models:
        uvloop.run(against(arguments.base_url, arguments.models, scale, report, arguments.api_key))
    else:
        parser.error("--base-url wants --models")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: this server over HTTP against transformers and PEFT on the same cores, in alternating runs.

Parts: ragged (32 requests of mixed lengths over base and adapters), equal (64 in, 64 out at 1, 8, 32 streams, base
and mixed), step (a mixed decode step over a base one), start (wall time to ready). Every peer figure is the better of
its dtypes; ours is given in each dtype.
"""

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Job, random_jobs, run_load
from benchmarks.processes import PeerProcess, Server, loramux, transformers_peer
from benchmarks.report import Report
from engine.models.source import resolve_model

ADAPTERS = {f"lora{i}": str(Path(__file__).parent.parent / "adapters" / f"lora{i}") for i in range(4)}
BASE, MIXED = ["llama"], [f"llama:{name}" for name in ADAPTERS]
DTYPES = ("float32", "bfloat16")
VOCAB = 49152
EQUAL_TARGETS = {("base", 1): 1.5, ("base", 8): 1.7, ("base", 32): 1.7, ("mixed", 8): 2.5, ("mixed", 32): 2.2}
STEP_TARGETS = {8: 1.55, 32: 1.45}
NO_CACHE = ("--disable-radix-cache",)  # runs repeat their prompts
CONTENDER = 0.75  # of the best peer's rate, to be measured again
Rates = dict[str, list[float]]  # tokens per second, run by run


@dataclass(frozen=True, slots=True)
class Bench:
    """What one run measures with. `peers` are keyed by (dtype, with adapters)."""

    report: Report
    servers: dict[str, Server]
    peers: dict[tuple[str, bool], PeerProcess]
    runs: int


def as_items(jobs: Sequence[Job]) -> list[tuple[str | None, list[int], int]]:
    return [(job.model.partition(":")[2] or None, list(job.prompt), job.output) for job in jobs]


async def race(bench: Bench, jobs: list[Job], adapters: bool, batches: Sequence[int]) -> tuple[Rates, Rates]:
    """Output tokens per second of (each of our dtypes, each peer dtype and batch size); they take turns.

    The first round warms up. What was far behind the best peer in it is not run again; its one figure is kept.
    """
    tokens = sum(job.output for job in jobs)
    peers = {f"{dtype}, batch {size}": (bench.peers[dtype, adapters], size) for dtype in DTYPES for size in batches}
    first = {label: tokens / peer.run(as_items(jobs), size) for label, (peer, size) in peers.items()}
    for server in bench.servers.values():
        await run_load(server.base_url, jobs)
    best = max(first.values())
    rivals = {label: peer for label, peer in peers.items() if first[label] >= CONTENDER * best}
    ours: Rates = {dtype: [] for dtype in bench.servers}
    theirs: Rates = {label: ([] if label in rivals else [rate]) for label, rate in first.items()}
    for _ in range(bench.runs):
        for dtype, server in bench.servers.items():
            ours[dtype].append((await run_load(server.base_url, jobs)).output_tokens_per_second)
        for label, (peer, size) in rivals.items():
            theirs[label].append(tokens / peer.run(as_items(jobs), size))
    return ours, theirs


def compare(bench: Bench, name: str, ours: Rates, theirs: Rates, target: float | None) -> None:
    """Rows for both sides and the ratio best against best."""
    for dtype, rates in ours.items():
        bench.report.add(f"{name}: loramux {dtype}", "tokens/s", rates)
    for label, rates in theirs.items():
        bench.report.add(f"{name}: peer {label}", "tokens/s", rates)
    mine = max(ours, key=lambda key: statistics.median(ours[key]))
    best = max(theirs, key=lambda key: statistics.median(theirs[key]))
    ratios = [a / b for a, b in zip(ours[mine], theirs[best], strict=True)]
    bench.report.add(f"{name}: ratio", "x", ratios, f">= {target}" if target else "", f"{mine} over {best}")


async def ragged(bench: Bench) -> None:
    jobs = random_jobs(BASE + MIXED, 32, (16, 128), (16, 128), VOCAB, seed=1)
    compare(bench, "ragged mixed, 32 requests", *await race(bench, jobs, True, (16, 32)), target=3.0)


async def equal(bench: Bench) -> None:
    for kind, models in (("base", BASE), ("mixed", MIXED)):
        for streams in (1, 8, 32):
            jobs = random_jobs(models, streams, (64, 64), (64, 64), VOCAB, seed=streams)
            results = await race(bench, jobs, kind == "mixed", (streams,))
            compare(bench, f"equal {kind}, {streams} streams", *results, target=EQUAL_TARGETS.get((kind, streams)))


async def step(bench: Bench) -> None:
    """The median gap between a stream's tokens while all streams decode, mixed over base."""
    for dtype, server in bench.servers.items():
        for streams, target in STEP_TARGETS.items():
            gaps: dict[str, list[float]] = {"base": [], "mixed": []}
            for run in range(bench.runs + 1):
                for kind, models in (("base", BASE), ("mixed", MIXED)):
                    jobs = random_jobs(models, streams, (64, 64), (64, 64), VOCAB, seed=streams)
                    result = await run_load(server.base_url, jobs, stream=True)
                    every = [gap for outcome in result.outcomes for gap in outcome.gaps[-32:]]
                    gaps[kind] += [1e3 * statistics.median(every)] if run else []
            for kind, values in gaps.items():
                bench.report.add(f"decode step {kind}, {streams} streams, {dtype}", "ms", values)
            ratios = [m / b for m, b in zip(gaps["mixed"], gaps["base"], strict=True)]
            bench.report.add(f"decode step mixed over base, {streams} streams, {dtype}", "x", ratios, f"<= {target}")


PARTS = {"ragged": ragged, "equal": equal, "step": step}


async def start_times(report: Report, runs: int, threads: int) -> None:
    seconds = []
    for _ in range(runs):
        async with loramux(threads=threads) as server:
            seconds.append(server.seconds_to_ready)
    report.add("start to ready, everything installed", "s", seconds, "< 10")


async def run(args: argparse.Namespace) -> None:
    report = Report("serving-cpu", args.commit)
    if "start" in args.parts:
        await start_times(report, args.runs, args.threads)
    parts = [PARTS[name] for name in args.parts if name in PARTS]
    if parts:
        folder = str(resolve_model(None))
        needed = {"ragged": {True}, "equal": {False, True}, "step": set[bool]()}
        kinds = set().union(*(needed[name] for name in args.parts if name in needed))
        with ExitStack() as stack:
            peers = {
                (dtype, adapters): stack.enter_context(
                    transformers_peer(folder, dtype, ADAPTERS if adapters else {}, args.threads)
                )
                for dtype in DTYPES
                for adapters in kinds
            }
            async with (
                loramux("--dtype", "float32", *NO_CACHE, threads=args.threads) as fp32,
                loramux("--dtype", "bfloat16", *NO_CACHE, threads=args.threads) as bf16,
            ):
                bench = Bench(report, {"float32": fp32, "bfloat16": bf16}, peers, args.runs)
                for part in parts:
                    await part(bench)
                    report.save(args.out)  # a long run that is cut off keeps what it has
    print(f"kept as {report.save(args.out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {[*PARTS, 'start']}; all by default")
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.parts = args.parts or [*PARTS, "start"]
    if unknown := set(args.parts) - {*PARTS, "start"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    asyncio.run(run(args))


if __name__ == "__main__":
    main()

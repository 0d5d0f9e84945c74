"""What the gateway alone bears: streams in turn from an engine that computes nothing, over HTTP.

    python -m benchmarks.gateway [--folder DIR] [--commit HASH] [--tiny]

Gateway, engine and client are processes of their own. Where the gateway does not keep up,
tokens of a stream come together.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from benchmarks.clients import HttpTarget
from benchmarks.driving import Outcome, in_turn, percentile
from benchmarks.idle_engine import STEP_SECONDS
from benchmarks.processes import Server, loramux
from benchmarks.report import Report, asked
from benchmarks.traffic import Lengths, make_jobs, staggered
from gateway.cli import settings_from
from gateway.flags import build_parser
from gateway.server import run
from tests.support.models import write_model

ENGINE = (sys.executable, "-m", "benchmarks.idle_engine")
MODEL = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    streams: Sequence[int]
    lengths: Lengths
    warm: float  # seconds before what counts
    seconds: float
    runs: int


FULL = Scale(streams=(32, 64, 128, 256), lengths=Lengths((128, 128), (128, 128), 200), warm=3.0, seconds=13.0, runs=3)
TINY = Scale(streams=(2,), lengths=Lengths((4, 4), (8, 8), 200), warm=0.2, seconds=0.6, runs=1)


async def measure(scale: Scale, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--served-model-name", MODEL, "--log-level", "warning")
        model = ("--model-path", str(write_model(Path(folder) / "model")))
        async with loramux(*model, *flags, threads=1, module="benchmarks.gateway") as server:
            await _measure(server, scale, report)


async def _measure(server: Server, scale: Scale, report: Report) -> None:
    for streams in scale.streams:
        runs = [await _run(server, streams, scale) for _ in range(scale.runs)]
        outcomes, shares = [outcome for outcome, _ in runs], [share for _, share in runs]
        gaps = [outcome.gaps(scale.warm) for outcome in outcomes]
        rates = [outcome.tokens_per_second(scale.warm, prompts=False) for outcome in outcomes]
        name = f"{streams} streams"
        report.add(f"{name}: answers", "tokens/s", rates, note=f"{streams / STEP_SECONDS:.0f} at most")
        report.add(f"{name}: of a core", "x", shares)
        for what, share in (("median", 0.5), ("99th percentile", 0.99), ("largest", 1.0)):
            report.add(f"{name}: gap, {what}", "ms", [percentile(each, share) for each in gaps])


async def _run(server: Server, streams: int, scale: Scale) -> tuple[Outcome, float]:
    """What the streams saw, and the gateway's seconds of CPU a second."""
    target, process = HttpTarget(server.base_url, lambda model: model), psutil.Process(server.pid)
    jobs = staggered(make_jobs(itertools.repeat(MODEL), scale.lengths, 1), streams)
    before = process.cpu_times()
    outcome = await in_turn(target, jobs, streams, scale.seconds)
    after = process.cpu_times()
    target.close()
    return outcome, (after.user + after.system - before.user - before.system) / scale.seconds


def serve_idle(argv: Sequence[str]) -> int:
    """`loramux serve` over the idle engine."""
    return run(settings_from(build_parser().parse_args(argv), os.environ), ENGINE)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["serve"]:
        return serve_idle(argv)
    report, tiny = asked("gateway", __doc__, argv)
    uvloop.run(measure(TINY if tiny else FULL, report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

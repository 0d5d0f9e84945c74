"""What the gateway alone bears: streams in turn from an engine that computes nothing, over HTTP.

    python -m benchmarks.gateway [--folder DIR] [--commit HASH] [--tiny]

Gateway, engine and client are processes of their own. A step is as long as given; where the gateway does not keep up,
tokens of a stream come together.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from benchmarks.clients import HttpTarget
from benchmarks.driving import Outcome, in_turn, percentile
from benchmarks.idle_engine import STEP_MS
from benchmarks.processes import free_port, healthy, server_log
from benchmarks.report import Report, asked
from benchmarks.traffic import Lengths, make_jobs, staggered
from gateway.cli import settings_from
from gateway.flags import build_parser
from gateway.server import bind, serve
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
    step_ms: float = 13.0  # of an engine's step of 256 sequences


FULL = Scale(streams=(32, 64, 128, 256), lengths=Lengths((128, 128), (128, 128), 200), warm=3.0, seconds=13.0, runs=3)
TINY = Scale(streams=(2,), lengths=Lengths((4, 4), (8, 8), 200), warm=0.2, seconds=0.6, runs=1)


async def measure(scale: Scale, report: Report) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        idle_gateway(write_model(Path(folder) / "model"), scale) as (url, process),
    ):
        await healthy(url, process)
        for streams in scale.streams:
            runs = [await _run(url, process.pid, streams, scale) for _ in range(scale.runs)]
            outcomes, shares = [outcome for outcome, _ in runs], [share for _, share in runs]
            gaps = [outcome.gaps(scale.warm) for outcome in outcomes]
            rates = [outcome.tokens_per_second(scale.warm, prompts=False) for outcome in outcomes]
            name = f"{streams} streams"
            report.add(f"{name}: answers", "tokens/s", rates, note=f"{streams / scale.step_ms * 1e3:.0f} at most")
            report.add(f"{name}: of a core", "x", shares)
            for what, share in (("median", 0.5), ("99th percentile", 0.99), ("largest", 1.0)):
                report.add(f"{name}: gap, {what}", "ms", [percentile(each, share) for each in gaps])


async def _run(url: str, gateway: int, streams: int, scale: Scale) -> tuple[Outcome, float]:
    """What the streams saw, and the gateway's seconds of CPU a second."""
    target, process = HttpTarget(url, lambda model: model), psutil.Process(gateway)
    jobs = staggered(make_jobs(itertools.repeat(MODEL), scale.lengths, 1), streams)
    before = process.cpu_times()
    outcome = await in_turn(target, jobs, streams, scale.seconds)
    after = process.cpu_times()
    target.close()
    return outcome, (after.user + after.system - before.user - before.system) / scale.seconds


@contextlib.contextmanager
def idle_gateway(model: Path, scale: Scale) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """(URL, process) of one that starts."""
    port = free_port()
    flags = ("--model-path", str(model), "--served-model-name", MODEL, "--log-level", "warning", "--port", str(port))
    with server_log().open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gateway", "serve", *flags],
            env={**os.environ, STEP_MS: str(scale.step_ms)}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def serve_idle(argv: Sequence[str]) -> int:
    """`loramux serve` over the idle engine."""
    settings = settings_from(build_parser().parse_args(argv), os.environ)
    with bind(settings.host, settings.port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings, listener, ENGINE))


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["serve"]:
        return serve_idle(argv)
    report, tiny = asked("gateway", __doc__, argv)
    uvloop.run(measure(TINY if tiny else FULL, report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The simulator against the real engine: the same trace, the same sizes, a tiny model on the CPU.

Time is counted in steps on both sides (`benchmarks/step_time.py`), so the machine's speed does not matter.
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.checkpoint import TINY, write_checkpoint
from benchmarks.simulator import Seconds, Simulation, Traffic
from benchmarks.step_time import Loads, Steps, Told, TraceLink
from engine.assemble import Engine, build
from engine.config import EngineConfig, LoraPath
from engine.models.dims import LORA_MODULES
from engine.scheduler import SchedulerConfig

RANKS = (8, 16, 32)  # of the adapters, in turn
BLOCK_TOKENS = 32  # of the tiny model
TRAFFIC = Traffic("Zipf 1.0, mixed ranks", 1.0, rate=0.5, prefix=64, prompt=16, output=12)  # rate: requests a step
CONTEXT = 96
ARENA_CHUNKS = 120
SECONDS = Seconds(step=1.0, token=0.0, load=0.6, chunk=0.0, source=3.4)  # in steps


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run."""

    requests: int = 3000
    adapters: int = 120
    on_host: int = 60


SMALL = Scale(requests=400, adapters=60, on_host=40)


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of the engine, and what the simulator needs to do the same."""

    told: Told
    pages: tuple[int, ...]  # chunks of the adapters, in turn
    config: SchedulerConfig
    overlap: bool


async def run_engine(scale: Scale, seed: int, *, overlap: bool) -> Measured:
    """Serves the trace with a tiny model and adapters of random weights."""
    link = TraceLink()
    with tempfile.TemporaryDirectory() as folder:
        engine = await build(settings(write_checkpoint(Path(folder), TINY), scale, overlap=overlap), link)
    try:
        return await _follow(engine, link, scale, seed, overlap=overlap)
    finally:
        engine.close()


def settings(model: Path, scale: Scale, *, overlap: bool) -> EngineConfig:
    paths = [
        LoraPath(name=str(index), path=f"random-{RANKS[index % len(RANKS)]}-all-{index}")
        for index in range(scale.adapters)
    ]
    return EngineConfig(
        model_path=str(model), load_format="dummy", device="cpu", threads=1, enable_lora=True, context_length=CONTEXT,
        lora_paths=tuple(paths), max_loaded_loras=scale.on_host, max_host_lora_bytes=64 << 20,
        max_lora_rank=max(RANKS), lora_target_modules=LORA_MODULES, max_total_tokens=ARENA_CHUNKS * BLOCK_TOKENS,
        disable_overlap_schedule=not overlap,
    )  # fmt: skip


async def _follow(engine: Engine, link: TraceLink, scale: Scale, seed: int, *, overlap: bool) -> Measured:
    scheduler = engine.scheduler
    steps = Steps(scheduler, link)
    Loads(engine, link, SECONDS)
    infos = {int(info.name): info for info in scheduler.adapters.infos()}
    traffic = replace(TRAFFIC, adapters=scale.adapters)
    arrivals = [
        (at, traffic.request(number, adapter, infos[adapter].adapter_id))
        for number, (at, adapter) in enumerate(traffic.arrivals(scale.requests, seed), 1)
    ]
    await link.begin(arrivals, steps, lambda: not engine.loop._flights)
    with link.skipping():
        await engine.run()
    pages = tuple(infos[index].bytes // scheduler.config.chunk_bytes for index in range(len(RANKS)))
    return Measured(steps.told(scheduler.stats()), pages, scheduler.config, overlap)


def run_simulator(measured: Measured, scale: Scale, seed: int) -> Told:
    """The same trace by the simulator, with the sizes of the engine that ran."""
    traffic = replace(TRAFFIC, adapters=scale.adapters, pages=measured.pages)
    simulation = Simulation(
        measured.config, traffic, requests=scale.requests, seed=seed, seconds=SECONDS, ahead=measured.overlap
    )
    steps = Steps(simulation.scheduler)
    simulation.run()
    return steps.told(simulation.scheduler.stats())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the short form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-overlap", action="store_true", help="the engine plans no step ahead")
    parser.add_argument("--json", type=Path, help="keep both rows here")
    args = parser.parse_args()
    scale = SMALL if args.small else Scale()
    measured = asyncio.run(run_engine(scale, args.seed, overlap=not args.no_overlap))
    rows = {"engine": asdict(measured.told), "simulator": asdict(run_simulator(measured, scale, args.seed))}
    for side, row in rows.items():
        print(side, " ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if args.json is not None:
        args.json.write_text(json.dumps({"scale": asdict(scale), "seed": args.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

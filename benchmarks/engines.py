"""Engines for benchmarks: a process as the gateway starts it, random weights, adapters made in memory."""

import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.checkpoint import write_checkpoint
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.messages import Stats
from gateway.engine_process import EngineProcess

LOADS_AT_ONCE = 8


@contextlib.asynccontextmanager
async def engine(model: Mapping[str, Any], config: EngineConfig) -> AsyncIterator[EngineClient]:
    """Ready, and gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_checkpoint(Path(folder) / "base", model))
        process = await EngineProcess.start(msgspec.structs.replace(config, model_path=path, load_format="dummy"))
        try:
            yield process.client
        finally:
            await process.stop()


async def load_adapters(client: EngineClient, prefix: str, count: int, rank: int, modules: str) -> list[str]:
    """The names of so many random adapters, on the host; those that are there stay."""
    names = [f"{prefix}{i}" for i in range(count)]
    todo = iter([(i, name) for i, name in enumerate(names) if name not in client.adapters])

    async def some() -> None:
        for i, name in todo:
            await client.load_adapter(name, f"random-{rank}-{modules}-{i}")

    await asyncio.gather(*(some() for _ in range(LOADS_AT_ONCE)))
    return names


def moved(before: Stats, after: Stats) -> tuple[int, int]:
    """(copies into the arena, evictions from it) between two moments."""
    loads = after.loads.get("device/ok", 0) - before.loads.get("device/ok", 0)
    return loads, _evicted(after.evictions) - _evicted(before.evictions)


def steps_taken(stats: Stats) -> str:
    """How many steps these statistics observed, their median length, and their mean tokens and sequences."""
    if not stats.step_seconds:
        return "no steps"
    tokens, sequences = (statistics.mean(values) for values in (stats.step_tokens, stats.step_sequences))
    median = statistics.median(stats.step_seconds) * 1e3
    return f"{len(stats.step_seconds)} steps, {median:.1f} ms, {tokens:.0f} tokens of {sequences:.0f} sequences"


def _evicted(evictions: Mapping[str, int]) -> int:
    return sum(count for key, count in evictions.items() if key.startswith("arena/"))

"""The parts that run a whole engine or server, and on what: sizes for a GPU, and the short form for the CPU."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks import cold as cold_starts
from benchmarks import offline as throughput
from benchmarks import online as server
from benchmarks import trace as traces
from benchmarks.checkpoint import LLAMA_8B, TINY
from benchmarks.engines import engine
from benchmarks.report import Report
from engine.config import EngineConfig
from engine.geometry import make_geometry
from engine.models.dims import LORA_MODULES, ModelDims
from tests.support.adapters import write_adapter

GROUPS: Mapping[str, Sequence[str]] = {
    "whole": ("offline", "cold"), "online": ("online",), "trace": ("trace",), "capped": ("capped",),
}  # fmt: skip
QKVO = LORA_MODULES[:4]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """`engine` is that of every part but online; the others' changes to it stand beside."""

    model: Mapping[str, Any]
    engine: EngineConfig
    trace_engine: Mapping[str, Any]
    capped_engine: Mapping[str, Any]
    offline: throughput.Offline
    cold: cold_starts.Cold
    files: int  # adapters on disk
    online: server.Online
    trace: traces.Trace
    capped: traces.Capped


# 8,192 tokens of prompts beside 256 decodes; on 132 multiprocessors their 66 tiles of 128 rows leave no turn unfilled.
STEP_TOKENS = 8192 + 256

FULL = Scale(
    model=LLAMA_8B,
    engine=EngineConfig(
        context_length=2048, enable_lora=True, max_loras_per_batch=64, max_lora_rank=16,
        lora_target_modules=LORA_MODULES, chunked_prefill_size=STEP_TOKENS, max_running_requests=256,
        disable_radix_cache=True, max_host_lora_bytes=24 << 30, log_level="warning",
    ),
    trace_engine={
        "max_loras_per_batch": 256, "max_lora_rank": 8, "lora_target_modules": QKVO, "chunked_prefill_size": 2048,
        "max_host_lora_bytes": 36 << 30,
    },
    capped_engine={
        "max_loras_per_batch": 64, "lora_target_modules": QKVO, "chunked_prefill_size": 2048,
        "max_host_lora_bytes": 36 << 30,
    },
    offline=throughput.Offline(),
    cold=cold_starts.Cold(),
    files=6,
    online=server.FULL,
    trace=traces.Trace(),
    capped=traces.Capped(),
)  # fmt: skip
SMALL = Scale(
    model=TINY,
    engine=EngineConfig(
        context_length=256, enable_lora=True, max_loras_per_batch=4, max_lora_rank=8, lora_target_modules=LORA_MODULES,
        max_running_requests=8, disable_radix_cache=True, max_host_lora_bytes=64 << 20, max_total_tokens=4096,
        threads=1, device="cpu", log_level="warning",
    ),
    trace_engine={"lora_target_modules": QKVO},
    capped_engine={"lora_target_modules": QKVO, "context_length": 32},
    offline=throughput.SMALL,
    cold=cold_starts.SMALL,
    files=2,
    online=server.SMALL,
    trace=traces.SMALL,
    capped=traces.SMALL_CAPPED,
)  # fmt: skip


async def run(parts: Sequence[str], scale: Scale, report: Report) -> None:
    """The parts of one group."""
    if "offline" in parts or "cold" in parts:
        await _offline_and_cold(parts, scale, report)
    if "online" in parts:
        await server.run(scale.online, report)
    if "trace" in parts:
        async with engine(scale.model, msgspec.structs.replace(scale.engine, **scale.trace_engine)) as client:
            await traces.trace(client, scale.trace, report)
    if "capped" in parts:
        await _capped(scale, report)


async def _offline_and_cold(parts: Sequence[str], scale: Scale, report: Report) -> None:
    async with engine(scale.model, scale.engine) as client:
        if "offline" in parts:
            await throughput.offline(client, scale.offline, report)
        if "cold" in parts:
            with tempfile.TemporaryDirectory() as folder:
                await cold_starts.cold(client, scale.cold, write_files(Path(folder), scale), report)


def write_files(folder: Path, scale: Scale) -> list[Path]:
    """Adapters on disk, in the base's dtype."""
    dims, rank = dims_of(scale.model), scale.cold.rank
    return [
        write_adapter(folder / f"disk{i}", dims, rank=rank, seed=i, std=0.02, dtype=torch.bfloat16)
        for i in range(scale.files)
    ]


async def _capped(scale: Scale, report: Report) -> None:
    """Two engines one after the other: only their arenas differ. The second holds the first's KV and a few adapters."""
    config = msgspec.structs.replace(scale.engine, **scale.capped_engine)
    async with engine(scale.model, config) as client:
        whole, kv = await traces.arena(client, scale.capped, report, "uncapped")
    async with engine(scale.model, capped_config(scale, config, kv)) as client:
        capped, _ = await traces.arena(client, scale.capped, report, "capped")
    report.add("arena capped over uncapped, throughput", "x", [capped / whole])


def capped_config(scale: Scale, config: EngineConfig, kv_chunks: int) -> EngineConfig:
    dims = dims_of(scale.model)
    geometry = make_geometry(dims, torch.bfloat16.itemsize)
    adapters = scale.capped.fitting * geometry.adapter_chunks(dims, scale.capped.rank, QKVO)
    return msgspec.structs.replace(config, max_total_tokens=(kv_chunks + adapters) * geometry.block_tokens)


def dims_of(model: Mapping[str, Any]) -> ModelDims:
    return ModelDims(
        layers=model["num_hidden_layers"], hidden=model["hidden_size"], intermediate=model["intermediate_size"],
        heads=model["num_attention_heads"], kv_heads=model["num_key_value_heads"], head_dim=model["head_dim"],
        vocab=model["vocab_size"],
    )  # fmt: skip

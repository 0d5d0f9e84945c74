"""How large the arena is, and the refusal of sizes that could not serve one full request."""

from dataclasses import dataclass

import psutil
import torch

from engine.config import EngineConfig
from engine.geometry import Geometry
from engine.models.dims import LORA_MODULES, ModelDims

CPU_ARENA_BYTES = 2 << 30
DEFAULT_LORA_RANK = 256


class StartupError(ValueError):
    """The settings cannot be served on this machine; the message says what would fit."""


@dataclass(frozen=True, slots=True)
class ArenaSize:
    chunks: int
    context_length: int  # tokens, checked to fit beside the largest allowed adapter


def size_arena(
    config: EngineConfig, dims: ModelDims, geometry: Geometry, context_length: int, allowed_bytes: int
) -> ArenaSize:
    """Chunks within the allowed bytes and `max_total_tokens`. Raises StartupError where a full request cannot fit."""
    chunks = allowed_bytes // geometry.chunk_bytes
    if config.max_total_tokens is not None:
        chunks = min(chunks, geometry.blocks(config.max_total_tokens))
    adapter = largest_adapter_chunks(config, dims, geometry)
    needed = geometry.blocks(context_length) + adapter
    if chunks < needed:
        raise StartupError(_refusal(geometry, context_length, chunks, adapter))
    return ArenaSize(chunks=chunks, context_length=context_length)


def largest_adapter_chunks(config: EngineConfig, dims: ModelDims, geometry: Geometry) -> int:
    """Chunks of the largest adapter that the limits allow; 0 without LoRA."""
    if not (config.enable_lora or config.lora_paths):
        return 0
    rank = DEFAULT_LORA_RANK if config.max_lora_rank is None else config.max_lora_rank
    return geometry.adapter_chunks(dims, rank, adapter_modules(config))


def adapter_modules(config: EngineConfig) -> tuple[str, ...]:
    """Those that adapters may have."""
    return LORA_MODULES if config.lora_target_modules is None else config.lora_target_modules


def allowed_bytes(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the arena may take now: on a GPU after the weights and a run at the largest step."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1.0 - config.mem_fraction_static)))
    return min(CPU_ARENA_BYTES, psutil.virtual_memory().available // 4)


def _refusal(geometry: Geometry, context_length: int, chunks: int, adapter: int) -> str:
    fits = (chunks - adapter) * geometry.block_tokens
    have = f"the arena holds {chunks} chunks of {geometry.block_tokens} tokens"
    if fits <= 0:
        return f"{have}, the largest allowed adapter alone needs {adapter}: lower --max-lora-rank or give more memory"
    return (
        f"{have}, of which the largest allowed adapter needs {adapter}; a context of {context_length} tokens does not "
        f"fit. The longest that fits is --context-length {fits}"
    )

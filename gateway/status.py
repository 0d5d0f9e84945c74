"""What GET /status tells: the arena by use, the slots, the base's own traffic, and whether the engine serves."""

from typing import Literal

import msgspec

from engine.messages import AdapterStats, Stats
from engine.types import ModelInfo

BASE = AdapterStats(name="", tier="none", pinned=False, rank=0)  # the base, of which the figures tell nothing yet


class ArenaUse(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks of the arena; all 0 while no engine serves."""

    chunk_bytes: int
    kv: int  # blocks of running sequences
    prefix: int  # blocks of the prefix cache that nobody uses
    adapter: int
    free: int


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters that one step can serve."""

    total: int
    used: int
    pinned: int


class BaseTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """The base without an adapter."""

    name: str
    requests_running: int
    requests_waiting: int
    requests_total: int  # accepted since the engine's start
    prompt_tokens: int
    generated_tokens: int


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /status."""

    object: str = "status"
    engine: Literal["up", "down"]  # down: lost, and being started again
    admin_key: bool  # whether the server has one; without, no web page can change it
    device: str
    dtype: str
    base: BaseTraffic
    arena: ArenaUse
    slots: Slots
    adapters_resident: int
    host_bytes: int  # of adapters in host memory
    requests_running: int
    requests_waiting: int


def server_status(model: ModelInfo, stats: Stats, *, alive: bool, admin_key: bool) -> ServerStatus:
    """`stats` is empty where the engine did not answer."""
    base = next((entry for entry in stats.adapters if not entry.name), BASE)
    return ServerStatus(
        engine="up" if alive else "down",
        admin_key=admin_key,
        device=model.device,
        dtype=model.dtype,
        base=_traffic(model.served_name, base),
        arena=_arena(model.chunk_bytes, stats.chunks),
        slots=Slots(total=model.max_loras_per_batch, used=stats.slots_used, pinned=stats.slots_pinned),
        adapters_resident=stats.resident,
        host_bytes=stats.tier_bytes.get("host", 0),
        requests_running=stats.running,
        requests_waiting=stats.waiting,
    )


def _traffic(name: str, stats: AdapterStats) -> BaseTraffic:
    return BaseTraffic(
        name=name,
        requests_running=stats.running,
        requests_waiting=stats.waiting,
        requests_total=stats.requests,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
    )


def _arena(chunk_bytes: int, chunks: dict[str, int]) -> ArenaUse:
    kv, prefix, adapter, free = (chunks.get(use, 0) for use in ("kv", "prefix", "adapter", "free"))
    return ArenaUse(chunk_bytes=chunk_bytes, kv=kv, prefix=prefix, adapter=adapter, free=free)

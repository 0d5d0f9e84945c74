"""What GET /v1/lora_adapters tells of each adapter: where it is, how large, how busy. Nothing of the server's paths."""

from collections.abc import Iterable

import msgspec

from engine.messages import AdapterStats, Stats
from engine.types import AdapterInfo, AdapterState

TIERS = {AdapterState.RESIDENT: "arena", AdapterState.HOST: "host"}


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter."""

    name: str
    object: str = "lora_adapter"
    id: str  # the served id, base:name
    state: AdapterState
    tier: str  # arena | host | none
    rank: int  # the largest; 0 while unknown
    modules: tuple[str, ...]  # empty while unknown
    bytes: int  # in the arena, when it is there; 0 while unknown
    pinned: bool
    error: str | None  # why its last load failed; null where it did not
    requests_running: int
    requests_waiting: int
    requests_total: int  # accepted since the engine's start
    prompt_tokens: int
    generated_tokens: int
    created: float  # unix seconds
    last_used: float | None  # unix seconds; null where no request has named it


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/lora_adapters."""

    object: str = "list"
    data: list[AdapterCard]


def adapter_list(base: str, adapters: Iterable[AdapterInfo], stats: Stats) -> AdapterList:
    """The adapters in the order of their loads; `stats` may know fewer of them, or of ones that are gone."""
    told = {adapter.name: adapter for adapter in stats.adapters}
    return AdapterList(data=[_card(base, adapter, told.get(adapter.name) or _idle(adapter)) for adapter in adapters])


def _card(base: str, adapter: AdapterInfo, stats: AdapterStats) -> AdapterCard:
    return AdapterCard(
        name=adapter.name,
        id=f"{base}:{adapter.name}",
        state=stats.state,
        tier=stats.tier,
        rank=stats.rank,
        modules=adapter.modules,
        bytes=adapter.bytes,
        pinned=stats.pinned,
        error=adapter.error if stats.state is AdapterState.FAILED else None,
        requests_running=stats.running,
        requests_waiting=stats.waiting,
        requests_total=stats.requests,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        created=adapter.created,
        last_used=stats.last_used or None,
    )


def _idle(adapter: AdapterInfo) -> AdapterStats:
    """What is known of an adapter that the engine's figures do not name."""
    return AdapterStats(
        name=adapter.name,
        tier=TIERS.get(adapter.state, "none"),
        pinned=adapter.pinned,
        rank=adapter.rank,
        waiting=adapter.requests,
        state=adapter.state,
        last_used=adapter.last_used,
    )

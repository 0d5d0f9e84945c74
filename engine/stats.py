"""Counters and observations of the brain, and the Stats message made of them. Called by the scheduler and the loop."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from engine.adapters.adapter import Adapter, Tally
from engine.messages import AdapterStats, Stats
from engine.types import AdapterState


class Recorder:
    """Totals since the engine's start, and what was observed since the last `take`."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()  # "stage/outcome"
        self._step_seconds: list[float] = []
        self._step_tokens: list[int] = []
        self._step_sequences: list[int] = []
        self._queue_seconds: list[float] = []
        self._load_seconds: list[tuple[str, float]] = []

    def add(self, name: str, count: int = 1) -> None:
        """Names carry no prefix and no `_total`."""
        self.counters[name] += count

    def step(self, seconds: float, tokens: int, sequences: int) -> None:
        self._step_seconds.append(seconds)
        self._step_tokens.append(tokens)
        self._step_sequences.append(sequences)

    def queued(self, seconds: float) -> None:
        self._queue_seconds.append(max(seconds, 0.0))

    def load(self, stage: str, outcome: str, seconds: float | None = None) -> None:
        """A load's stage (source, host, device) ended in `outcome` (ok, failed) after `seconds`, where known."""
        self.loads[f"{stage}/{outcome}"] += 1
        if seconds is not None:
            self._load_seconds.append((stage, max(seconds, 0.0)))

    def take(self, gauges: Stats) -> Stats:
        """The gauges completed by totals and by what was observed since the last call."""
        told = msgspec.structs.replace(
            gauges,
            counters=dict(self.counters),
            loads=dict(self.loads),
            step_seconds=self._step_seconds,
            step_tokens=self._step_tokens,
            step_sequences=self._step_sequences,
            queue_seconds=self._queue_seconds,
            load_seconds=self._load_seconds,
        )
        self._step_seconds, self._step_tokens, self._step_sequences = [], [], []
        self._queue_seconds, self._load_seconds = [], []
        return told


def adapter_stats(
    adapters: Iterable[Adapter], base: Tally, unix_offset: float = 0.0, retired: Iterable[Adapter] = ()
) -> list[AdapterStats]:
    """The base under the name '', then every adapter, counted with those `retired` that had its name.

    `unix_offset` turns the clock of `now` into unix seconds.
    """
    told = [_stats("", base, tier="arena", pinned=True, rank=0, state=AdapterState.RESIDENT, last_used=0.0)]
    before: dict[str, Tally] = {}
    for old in retired:
        before[old.name] = _sum(before.get(old.name, Tally()), old.tally)
    return told + [_adapter(adapter, unix_offset, before.get(adapter.name)) for adapter in adapters]


def _sum(one: Tally, other: Tally) -> Tally:
    total = replace(one, waiting=one.waiting + other.waiting, running=one.running + other.running)
    total.inherit(other)
    return total


def _adapter(adapter: Adapter, unix_offset: float, before: Tally | None) -> AdapterStats:
    return _stats(
        adapter.name,
        adapter.tally if before is None else _sum(adapter.tally, before),
        tier=_tier(adapter),
        pinned=adapter.pinned,
        rank=adapter.rank,
        state=adapter.state,
        last_used=adapter.used_at + unix_offset if adapter.used_at is not None else 0.0,
    )


def _tier(adapter: Adapter) -> str:
    if adapter.ready:
        return "arena"
    return "host" if adapter.on_host else "none"


def _stats(
    name: str, tally: Tally, *, tier: str, pinned: bool, rank: int, state: AdapterState, last_used: float
) -> AdapterStats:
    return AdapterStats(
        name=name,
        tier=tier,
        pinned=pinned,
        rank=rank,
        requests=tally.requests,
        prompt_tokens=tally.prompt_tokens,
        generated_tokens=tally.generated_tokens,
        waiting=tally.waiting,
        running=tally.running,
        state=state,
        last_used=last_used,
    )

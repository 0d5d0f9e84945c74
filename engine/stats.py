"""Counters and observations of the brain, and the Stats message made of them. Called by the scheduler and the loop."""

from collections import Counter
from collections.abc import Iterable

import msgspec

from engine.adapters.catalog import Adapter, Tally
from engine.messages import AdapterStats, Stats


class Recorder:
    """Totals since the engine's start, and what was observed since the last `take`."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()  # "stage/outcome"
        self._step_seconds: list[float] = []
        self._step_tokens: list[int] = []
        self._queue_seconds: list[float] = []
        self._load_seconds: list[tuple[str, float]] = []

    def add(self, name: str, count: int = 1) -> None:
        """Names carry no prefix and no `_total`."""
        self.counters[name] += count

    def step(self, seconds: float, tokens: int) -> None:
        self._step_seconds.append(seconds)
        self._step_tokens.append(tokens)

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
            queue_seconds=self._queue_seconds,
            load_seconds=self._load_seconds,
        )
        self._step_seconds, self._step_tokens, self._queue_seconds, self._load_seconds = [], [], [], []
        return told


def adapter_stats(adapters: Iterable[Adapter], base: Tally) -> list[AdapterStats]:
    """The base under the name '', then every adapter."""
    told = [_stats("", base, tier="arena", pinned=True, rank=0)]
    told += [_stats(a.name, a.tally, tier=_tier(a), pinned=a.pinned, rank=a.rank) for a in adapters]
    return told


def _tier(adapter: Adapter) -> str:
    if adapter.ready:
        return "arena"
    return "host" if adapter.on_host else "none"


def _stats(name: str, tally: Tally, *, tier: str, pinned: bool, rank: int) -> AdapterStats:
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
    )

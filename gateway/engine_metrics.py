"""The engine's `Stats` as Prometheus families: gauges as last told, counters that outlive an engine."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.messages import AdapterStats, Stats
from engine.types import ModelInfo

Key = tuple[str, tuple[str, ...]]  # metric, label values

SKIPS = "skips_"  # before the reason in the engine's names
NAME = re.compile(r"[a-z][a-z0-9_]*")
ADAPTER_COUNTERS = {
    "adapter_requests": "Sequences accepted.",
    "adapter_prompt_tokens": "Tokens of accepted prompts.",
    "adapter_generated_tokens": "Tokens generated.",
}
LABELLED = {
    "evictions": ("Adapters and prefix blocks evicted.", ("tier", "reason")),
    "skips": ("Waiting sequences that a step passed over, each counted in each step.", ("reason",)),
    "adapter_loads": ("Stages of adapter loads that ended.", ("stage", "outcome")),
}
LOAD_STAGES = ("source", "host", "device")
COUNTER_HELP = {
    "adapters_replaced": "Loads in place that gave a name other weights.",
    "aborted": "Sequences aborted: the client went, or a stop string was found.",
    "adapter_hits": "Sequences whose adapter was resident when they came.",
    "adapter_misses": "Sequences whose adapter had to be loaded first.",
    "discarded_rows": "Rows computed for sequences that had ended a step before.",
    "drains": "Adapters unloaded and freed on every tier.",
    "failed": "Requests that ended without a result.",
    "finished_length": "Sequences that reached their limit.",
    "finished_stop": "Sequences that ended by an end token.",
    "graph_replays": "Steps that ran as a captured graph.",
    "load_preemptions": "Sequences whose memory was taken for a load that had waited for its bound.",
    "load_reservations": "Loads that got their memory because they had waited longest.",
    "mixed_adapter_steps": "Steps that served more than one of base and adapters.",
    "mixed_steps": "Steps with prefill and decode together.",
    "preemptions": "Sequences whose memory was taken for others.",
    "prefetch_hits": "Adapters that were in the arena before the turn of a sequence that had come without them.",
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache.",
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache.",
    "prompt_chunks": "Parts of prompts that did not fit a step whole.",
    "resumptions": "Preempted sequences that run again.",
    "slot_reservations": "Slots left to drain for the adapter that waits longest.",
    "steps": "Steps of the engine.",
    "steps_planned_ahead": "Steps planned while the one before still ran.",
}
# Told as 0 before the engine has counted any, so that rates see the first one.
NOTHING_YET: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(COUNTER_HELP, ((),)),
    "evictions": (
        ("arena", "memory"), ("arena", "host"), ("arena", "unload"), ("arena", "replaced"), ("arena", "failed"),
        ("host", "capacity"), ("prefix", "memory"),
    ),
    "skips": (("not_resident",), ("no_slot",), ("slot_drains",)),
    "adapter_loads": tuple((stage, outcome) for stage in LOAD_STAGES for outcome in ("ok", "failed")),
}  # fmt: skip


class Totals:
    """Counters over several engines: each value is what earlier engines reached plus the present one's."""

    def __init__(self) -> None:
        self._before: dict[Key, int] = defaultdict(int)
        self._now: dict[Key, int] = {}

    def tell(self, key: Key, value: int) -> None:
        last = self._now.get(key, 0)
        if value < last:
            self._before[key] += last
        self._now[key] = value

    def restart(self) -> None:
        """What comes next counts from zero."""
        for key, value in self._now.items():
            self._before[key] += value
        self._now = dict.fromkeys(self._now, 0)

    def forget(self, is_gone: Callable[[str, tuple[str, ...]], bool]) -> None:
        """Drops the counters for which `is_gone(metric, labels)`."""
        for key in [key for key in self._now if is_gone(*key)]:
            del self._now[key]
            self._before.pop(key, None)

    def snapshot(self) -> dict[str, list[tuple[tuple[str, ...], int]]]:
        """Label values and totals by metric; safe beside writers."""
        totals = {(metric, labels): 0 for metric, known in NOTHING_YET.items() for labels in known}
        totals |= {key: value + self._before.get(key, 0) for key, value in list(self._now.items())}
        by_metric: dict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
        for (metric, labels), value in totals.items():
            by_metric[metric].append((labels, value))
        return by_metric


class EngineCollector(Collector):
    """Read by the registry at each scrape, perhaps in a thread; `_stats` is replaced, never changed."""

    def __init__(self) -> None:
        self._stats = Stats()
        self._base = ""
        self._totals = Totals()

    def started(self, model: ModelInfo) -> None:
        self._base = model.served_name
        self._totals.restart()

    def lost(self) -> None:
        """Nothing runs and nothing is resident; totals stay."""
        self._stats = Stats()

    def update(self, stats: Stats) -> None:
        self._forget_gone(stats)
        self._stats = stats
        for name, value in stats.counters.items():
            if name.startswith(SKIPS):
                self._totals.tell(("skips", (name.removeprefix(SKIPS),)), value)
            elif NAME.fullmatch(name):
                self._totals.tell((name, ()), value)
        self._tell_pairs("evictions", stats.evictions)
        self._tell_pairs("adapter_loads", stats.loads)
        for adapter in stats.adapters:
            for key, value in self._adapter_counts(adapter).items():
                self._totals.tell(key, value)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield from self._gauges(stats)
        yield from self._adapter_gauges(stats)
        yield from self._counters()

    def _forget_gone(self, stats: Stats) -> None:
        present = {adapter.name for adapter in stats.adapters}
        self._totals.forget(lambda metric, labels: metric in ADAPTER_COUNTERS and labels[1] not in present)

    def _adapter_counts(self, adapter: AdapterStats) -> dict[Key, int]:
        counts = (adapter.requests, adapter.prompt_tokens, adapter.generated_tokens)
        labels = (self._base, adapter.name)
        return {(metric, labels): count for metric, count in zip(ADAPTER_COUNTERS, counts, strict=True)}

    def _tell_pairs(self, metric: str, pairs: dict[str, int]) -> None:
        """Keys are two labels with a slash between them."""
        for pair, value in pairs.items():
            first, _, second = pair.partition("/")
            self._totals.tell((metric, (first, second)), value)

    def _gauges(self, stats: Stats) -> Iterator[Metric]:
        yield _gauge("requests_running", "Sequences in the running batch.", stats.running)
        yield _gauge("requests_waiting", "Sequences that wait to be admitted.", stats.waiting)
        yield _gauge("queue_age_seconds", "Since the oldest request came that still waits to start.", stats.queue_age)
        yield _gauge("slots", "Adapters that one step can serve.", stats.slots_total)
        yield _gauge("slots_used", "Slots that hold an adapter.", stats.slots_used)
        yield _gauge("slots_pinned", "Slots that hold a pinned adapter.", stats.slots_pinned)
        yield _gauge("adapters_resident", "Adapters whose pieces are in the arena.", stats.resident)
        yield _labelled("adapter_bytes", "Bytes of adapters by tier.", "tier", stats.tier_bytes)
        yield _labelled("chunks", "Chunks of the arena by use.", "use", stats.chunks)

    def _adapter_gauges(self, stats: Stats) -> Iterator[Metric]:
        labels = ("base", "adapter")
        loaded = GaugeMetricFamily(
            "loramux_adapter_loaded",
            "1 for each adapter served, with the tier it is in.",
            labels=(*labels, "tier", "pinned"),
        )
        rank = GaugeMetricFamily("loramux_adapter_rank", "Largest rank; 0 while unknown.", labels=labels)
        running = GaugeMetricFamily("loramux_adapter_requests_running", "Its sequences that run.", labels=labels)
        waiting = GaugeMetricFamily("loramux_adapter_requests_waiting", "Its sequences that wait.", labels=labels)
        for adapter in stats.adapters:
            values = (self._base, adapter.name)
            running.add_metric(values, adapter.running)
            waiting.add_metric(values, adapter.waiting)
            if adapter.name:
                loaded.add_metric((*values, adapter.tier, str(adapter.pinned).lower()), 1)
                rank.add_metric(values, adapter.rank)
        yield from (loaded, rank, running, waiting)

    def _counters(self) -> Iterator[Metric]:
        totals = self._totals.snapshot()
        for metric, (text, labels) in LABELLED.items():
            yield _counter(metric, text, labels, totals.pop(metric, []))
        for metric, text in ADAPTER_COUNTERS.items():
            yield _counter(metric, text, ("base", "adapter"), totals.pop(metric, []))
        for metric, values in sorted(totals.items()):
            text = COUNTER_HELP.get(metric, f"{metric.replace('_', ' ').capitalize()}.")
            yield _counter(metric, text, (), values)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"loramux_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"loramux_{name}", text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: list[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(f"loramux_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family

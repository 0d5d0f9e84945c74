"""Every metric that the server can export, with its labels: a registry told of everything once, read back."""

from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from engine.messages import AdapterStats, Stats
from gateway.metrics import Metrics
from tests.gateway.fake_engine import model_info

SCRAPED = frozenset({"instance", "job"})  # Prometheus' own labels on all it scrapes


def everything() -> Metrics:
    """Metrics that have seen one of everything."""
    metrics = Metrics()
    metrics.engine_started(model_info())
    sql = AdapterStats(name="sql", tier="arena", pinned=True, rank=8)
    metrics.update(
        Stats(
            tier_bytes={"arena": 1, "host": 1},
            chunks={"kv": 1, "prefix": 1, "adapter": 1, "free": 1},
            adapters=[AdapterStats(name="", tier="arena", pinned=True, rank=0), sql],
            step_seconds=[0.1],
            step_tokens=[1],
            step_sequences=[1],
            queue_seconds=[0.1],
            load_seconds=[("source", 0.1)],
        )
    )
    timer = metrics.request_started("llama", "sql")
    timer.first_token()
    timer.tokens(1)
    timer.tokens(1)
    timer.finished("stop", 1, 2)
    metrics.http_request("/health", "GET", 200, 0.1)
    return metrics


def families(text: str | None = None) -> list[Any]:
    """The exposition's families, by default those of `everything`."""
    return list(text_string_to_metric_families(text or everything().render()[0].decode()))


def series_labels() -> Mapping[str, frozenset[str]]:
    """By the name of a series as queries call it (`..._bucket`): its labels, Prometheus' own among them."""
    labels: dict[str, frozenset[str]] = {}
    for family in families():
        for sample in family.samples:
            labels[sample.name] = frozenset(sample.labels) | SCRAPED
    return labels


def metric_labels() -> Mapping[str, frozenset[str]]:
    """By the name of a metric as the docs call it (a counter with `_total`, a histogram without suffix): its labels."""
    labels: dict[str, frozenset[str]] = {}
    for family in families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        own = {label for sample in family.samples for label in sample.labels}
        labels[name] = frozenset(own - {"le"} if family.type == "histogram" else own)
    return labels

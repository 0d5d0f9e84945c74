"""The server's metrics, in the one Prometheus registry: what the gateway measures itself and what the engine tells.

Series of an adapter go when the adapter goes. Nothing here waits; `render` may run in a thread.
"""

import importlib.metadata
import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from engine.messages import Stats
from engine.types import ModelInfo
from gateway.engine_metrics import LOAD_STAGES, EngineCollector

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120)
HTTP = (0.005, 0.025, *WHOLE)
STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 3, 10, 60)
LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
LENGTH = tuple(2.0**power for power in range(18))
ADAPTER_LABELS = ("base", "adapter")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestTimer:
    """Follows one choice from its submission to its end."""

    def __init__(self, latencies: "Latencies", now: Callable[[], float]) -> None:
        self._latencies = latencies
        self._now = now
        self._start = now()
        self._last: float | None = None

    def first_token(self) -> None:
        self._latencies.first_token.observe(self._now() - self._start)

    def tokens(self, count: int) -> None:
        """So many tokens came together; those that came with the first one have no gap before them."""
        now = self._now()
        if self._last is not None:
            for _ in range(count):
                self._latencies.inter_token.observe((now - self._last) / count)
        self._last = now

    def finished(self, reason: str, prompt_tokens: int, generated: int) -> None:
        """`prompt_tokens` is 0 for all but one choice of a prompt."""
        if reason != "abort":
            self._latencies.whole.observe(self._now() - self._start)
        if prompt_tokens:
            self._latencies.prompt_tokens.observe(prompt_tokens)
        self._latencies.generated_tokens.observe(generated)
        self._latencies.finished(reason).inc()


class Latencies:
    """One adapter's own series, kept by its timers: what they tell after the adapter went, nobody sees."""

    def __init__(self, metrics: "Metrics", base: str, adapter: str) -> None:
        self.first_token = metrics.first_token.labels(base, adapter)
        self.inter_token = metrics.inter_token.labels(base, adapter)
        self.whole = metrics.whole.labels(base, adapter)
        self.prompt_tokens = metrics.prompt_tokens.labels(base)
        self.generated_tokens = metrics.generated_tokens.labels(base)
        self._finished = metrics.finished
        self._base = base

    def finished(self, reason: str) -> Counter:
        return self._finished.labels(self._base, reason)


class Metrics:
    """Owned by the server; every route, the middleware and the supervisor tell it what happens."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they are second series that no dashboard wants
        self._now = now
        self._registry = CollectorRegistry()
        self._engine = EngineCollector()
        self._registry.register(self._engine)
        self._latencies: dict[tuple[str, str], Latencies] = {}
        self._young: set[tuple[str, str]] = set()  # first seen since the engine's last word
        self._make_request_metrics()
        self._make_engine_metrics()

    def request_started(self, base: str, adapter: str) -> RequestTimer:
        """Starts the clock of one choice. `adapter` is '' for the base."""
        key = (base, adapter)
        latencies = self._latencies.get(key)
        if latencies is None:
            latencies = self._latencies[key] = Latencies(self, base, adapter)
            self._young.add(key)
        return RequestTimer(latencies, self._now)

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is a template, never a path as it came."""
        self._http_requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def engine_started(self, model: ModelInfo) -> None:
        """Another engine counts from zero; totals go on from where they were."""
        self._engine.started(model)
        self._up.set(1)

    def engine_lost(self) -> None:
        self._engine.lost()
        self._up.set(0)
        self._restarts.inc()

    def update(self, stats: Stats) -> None:
        """Takes over what the engine tells; called once for each `Stats`."""
        self._engine.update(stats)
        for seconds in stats.step_seconds:
            self._step_seconds.observe(seconds)
        for tokens in stats.step_tokens:
            self._step_tokens.observe(tokens)
        for sequences in stats.step_sequences:
            self._step_sequences.observe(sequences)
        for seconds in stats.queue_seconds:
            self._queue_seconds.observe(seconds)
        for stage, seconds in stats.load_seconds:
            self._load_seconds.labels(stage).observe(seconds)
        self._forget_gone({adapter.name for adapter in stats.adapters} | {""})

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its media type, in the format that the scraper accepts."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def _forget_gone(self, known: set[str]) -> None:
        """Drops series of adapters that the engine no longer knows; one it cannot have told of yet is spared."""
        gone = [key for key in self._latencies if key[1] not in known and key not in self._young]
        for key in gone:
            del self._latencies[key]
            for histogram in (self.first_token, self.inter_token, self.whole):
                histogram.remove(*key)
        self._young.clear()

    def _make_request_metrics(self) -> None:
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From submission to the first token of a choice.",
            FIRST_TOKEN,
            *ADAPTER_LABELS,
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", INTER_TOKEN, *ADAPTER_LABELS
        )
        self.whole = self._histogram(
            "request_seconds",
            "From submission to the end of a choice; aborted ones are left out.",
            WHOLE,
            *ADAPTER_LABELS,
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", LENGTH, "base")
        self.generated_tokens = self._histogram("request_generated_tokens", "Tokens of a choice.", LENGTH, "base")
        self.finished = self._counter("requests_finished", "Choices that ended, by reason.", "base", "reason")
        self._http_requests = self._counter("http_requests", "Answered requests.", "route", "method", "status")
        self._http_seconds = self._histogram("http_request_seconds", "Until the answer's end.", HTTP, "route")

    def _make_engine_metrics(self) -> None:
        self._up = Gauge("loramux_engine_up", "1 while the engine serves.", registry=self._registry)
        self._restarts = self._counter("engine_losses", "Engines that died or hung.")
        self._step_seconds = self._histogram("step_seconds", "One engine step.", STEP)
        self._step_tokens = self._histogram("step_tokens", "Tokens computed in one step.", LENGTH)
        self._step_sequences = self._histogram("step_sequences", "Sequences in one step.", LENGTH)
        self._queue_seconds = self._histogram("queue_seconds", "From arrival until first planned.", QUEUE)
        self._load_seconds = self._histogram("adapter_load_seconds", "One stage of an adapter's load.", LOAD, "stage")
        for stage in LOAD_STAGES:
            self._load_seconds.labels(stage)
        build = Info("loramux_build", "The server's version.", registry=self._registry)
        build.info({"version": importlib.metadata.version("loramux")})

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"loramux_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"loramux_{name}", text, labels, registry=self._registry)

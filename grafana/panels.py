"""What the two dashboards show: panels and queries, in the order in which they stand. Read by make_dashboards.py."""

from dataclasses import dataclass

SERVER = 'instance=~"$instance"'
ADAPTER = f'{SERVER}, base=~"$base", adapter=~"$adapter"'
QUANTILES = (0.5, 0.95, 0.99)
TOP = 20  # series of a panel that shows adapters; there may be hundreds


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; `width` of 24 columns."""

    title: str
    queries: tuple[Query, ...]
    description: str = ""
    unit: str = "short"
    kind: str = "timeseries"  # timeseries | stat | table
    width: int = 8
    height: int = 8
    stacked: bool = False
    red_below: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard, the file `name`.json. `variables`: name, label, query."""

    name: str
    uid: str
    title: str
    description: str
    variables: tuple[tuple[str, str, str], ...]
    panels: tuple[Panel, ...]


def gauge(name: str, labels: str = SERVER) -> str:
    return f"sum(loramux_{name}{{{labels}}})"


def by(label: str, expr: str, legend: str = "") -> Query:
    return Query(f"sum by ({label}) ({expr})", legend or f"{{{{{label}}}}}")


def rate(name: str, labels: str = SERVER) -> str:
    return f"rate(loramux_{name}{{{labels}}}[$__rate_interval])"


def total(name: str, labels: str = SERVER) -> str:
    return f"sum({rate(f'{name}_total', labels)})"


def mean(name: str, labels: str = SERVER) -> str:
    return f"sum({rate(f'{name}_sum', labels)}) / sum({rate(f'{name}_count', labels)})"


def quantile(q: float, name: str, labels: str = SERVER, keep: str = "le") -> str:
    return f"histogram_quantile({q}, sum by ({keep}) ({rate(f'{name}_bucket', labels)}))"


def quantiles(name: str, labels: str = SERVER) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, name, labels), f"p{q * 100:.0f}") for q in QUANTILES)


def share(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def top(expr: str) -> tuple[Query, ...]:
    """The busiest adapters; the base is the one without a name behind the colon."""
    return (Query(f"topk({TOP}, {expr})", "{{base}}:{{adapter}}"),)


def by_adapter(expr: str) -> tuple[Query, ...]:
    return top(f"sum by (base, adapter) ({expr})")


INSTANCE = ("instance", "Server", "label_values(loramux_engine_up, instance)")
BASE = ("base", "Base", f"label_values(loramux_adapter_requests_total{{{SERVER}}}, base)")
ADAPTERS = ("adapter", "Adapter", f'label_values(loramux_adapter_loaded{{{SERVER}, base=~"$base"}}, adapter)')
ARENA = Panel(
    title="Arena by use",
    description="KV blocks in use, cached prefixes, adapters and free chunks: one pool of memory.",
    queries=(by("use", f"loramux_chunks{{{SERVER}}}"),),
    stacked=True,
)

SERVING = Board(
    name="serving",
    uid="loramux-serving",
    title="loramux: serving",
    description="Requests, latencies, the engine's steps and its memory.",
    variables=(INSTANCE, BASE, ADAPTERS),
    panels=(
        Panel(
            title="Engine", kind="stat", width=4, height=4, red_below=1,
            queries=(Query(f"min(loramux_engine_up{{{SERVER}}})"),),
        ),
        Panel(title="Running", kind="stat", width=4, height=4, queries=(Query(gauge("requests_running")),)),
        Panel(title="Waiting", kind="stat", width=4, height=4, queries=(Query(gauge("requests_waiting")),)),
        Panel(
            title="Queue age", kind="stat", unit="s", width=4, height=4,
            queries=(Query(f"max(loramux_queue_age_seconds{{{SERVER}}})"),),
        ),
        Panel(
            title="Generated tokens per second", kind="stat", width=4, height=4,
            queries=(Query(total("adapter_generated_tokens", ADAPTER)),),
        ),
        Panel(
            title="Time to first token, p95", kind="stat", unit="s", width=4, height=4,
            queries=(Query(quantile(0.95, "time_to_first_token_seconds", ADAPTER)),),
        ),
        Panel(title="Time to first token", unit="s", queries=quantiles("time_to_first_token_seconds", ADAPTER)),
        Panel(title="Inter-token latency", unit="s", queries=quantiles("inter_token_latency_seconds", ADAPTER)),
        Panel(title="Request, from submission to end", unit="s", queries=quantiles("request_seconds", ADAPTER)),
        Panel(
            title="Requests",
            queries=(Query(gauge("requests_running"), "running"), Query(gauge("requests_waiting"), "waiting")),
        ),
        Panel(
            title="Choices that end per second", unit="ops", stacked=True,
            queries=(by("reason", rate("requests_finished_total", f'{SERVER}, base=~"$base"')),),
        ),
        Panel(
            title="Tokens per second",
            queries=(
                Query(total("adapter_prompt_tokens", ADAPTER), "prompt"),
                Query(total("adapter_generated_tokens", ADAPTER), "generated"),
            ),
        ),
        Panel(title="Time in the queue", unit="s", queries=quantiles("queue_seconds")),
        Panel(title="Engine step", unit="s", queries=quantiles("step_seconds")),
        Panel(
            title="Batch size, mean of a step",
            queries=(Query(mean("step_sequences"), "sequences"), Query(mean("step_tokens"), "tokens")),
        ),
        ARENA,
        Panel(
            title="Prefix cache: share of prompt tokens found", unit="percentunit",
            queries=(Query(share(total("prefix_hit_tokens"), total("prefix_query_tokens")), "hit"),),
        ),
        Panel(
            title="Steps: shares", unit="percentunit",
            queries=(
                Query(share(total("steps_planned_ahead"), total("steps")), "planned ahead"),
                Query(share(total("graph_replays"), total("steps")), "replayed graphs"),
                Query(share(total("mixed_steps"), total("steps")), "prefill and decode"),
                Query(share(total("mixed_adapter_steps"), total("steps")), "several adapters"),
            ),
        ),
        Panel(
            title="Trouble per second", unit="ops",
            queries=(
                Query(total("preemptions"), "preemptions"),
                Query(total("failed"), "failed requests"),
                Query(total("aborted"), "aborted sequences"),
                Query(total("engine_losses"), "engine losses"),
            ),
        ),
        Panel(
            title="HTTP answers per second", unit="ops",
            queries=(Query(f"sum by (route, status) ({rate('http_requests_total')})", "{{route}} {{status}}"),),
        ),
        Panel(
            title="HTTP time, p95", unit="s",
            queries=(Query(quantile(0.95, "http_request_seconds", keep="route, le"), "{{route}}"),),
        ),
        Panel(
            title="Tokens of a request, mean", width=24,
            queries=(
                Query(mean("request_prompt_tokens", f'{SERVER}, base=~"$base"'), "prompt"),
                Query(mean("request_generated_tokens", f'{SERVER}, base=~"$base"'), "generated"),
            ),
        ),
    ),
)  # fmt: skip

ADAPTER_BOARD = Board(
    name="adapters",
    uid="loramux-adapters",
    title="loramux: adapters",
    description="Where adapters are, how they come and go, and how each of them serves.",
    variables=(INSTANCE, BASE, ADAPTERS),
    panels=(
        Panel(
            title="Slot pool", description="Adapters that one step can serve, and how many of these slots are held.",
            queries=(
                Query(gauge("slots"), "slots"),
                Query(gauge("slots_used"), "used"),
                Query(gauge("slots_pinned"), "pinned"),
            ),
        ),
        Panel(
            title="Residency by tier", description="none: only at its source.", stacked=True,
            queries=(Query(f'count by (tier) (loramux_adapter_loaded{{{SERVER}, base=~"$base"}})', "{{tier}}"),),
        ),
        ARENA,
        Panel(
            title="Hits and misses per second", unit="ops",
            description="Hit: the adapter was resident when the request came. Prefetch hit: it was by its turn.",
            queries=(
                Query(total("adapter_hits"), "hits"),
                Query(total("adapter_misses"), "misses"),
                Query(total("prefetch_hits"), "prefetch hits"),
            ),
        ),
        Panel(
            title="Hit rate", unit="percentunit",
            queries=(Query(
                share(total("adapter_hits"), f"({total('adapter_hits')} + {total('adapter_misses')})"), "hit rate"
            ),),
        ),
        Panel(
            title="Evictions per second", unit="ops", stacked=True,
            queries=(Query(f"sum by (tier, reason) ({rate('evictions_total')})", "{{tier}}: {{reason}}"),),
        ),
        Panel(
            title="Load seconds, p95 by stage", unit="s",
            description="source: read and checked; host: laid out in host memory; device: copied to the arena.",
            queries=(Query(quantile(0.95, "adapter_load_seconds", keep="stage, le"), "{{stage}}"),),
        ),
        Panel(
            title="Loads per second", unit="ops",
            queries=(Query(f"sum by (stage, outcome) ({rate('adapter_loads_total')})", "{{stage}}: {{outcome}}"),),
        ),
        Panel(
            title="Bytes by tier", unit="bytes",
            queries=(by("tier", f"loramux_adapter_bytes{{{SERVER}}}"),),
        ),
        Panel(title="Queue by adapter", queries=by_adapter(f"loramux_adapter_requests_waiting{{{ADAPTER}}}")),
        Panel(title="Running by adapter", queries=by_adapter(f"loramux_adapter_requests_running{{{ADAPTER}}}")),
        Panel(
            title="Sequences per second by adapter", unit="ops",
            queries=by_adapter(rate("adapter_requests_total", ADAPTER)),
        ),
        Panel(
            title="Time to first token by adapter, p95", unit="s",
            queries=top(quantile(0.95, "time_to_first_token_seconds", ADAPTER, "base, adapter, le")),
        ),
        Panel(
            title="Inter-token latency by adapter, p95", unit="s",
            queries=top(quantile(0.95, "inter_token_latency_seconds", ADAPTER, "base, adapter, le")),
        ),
        Panel(
            title="Generated tokens per second by adapter",
            queries=by_adapter(rate("adapter_generated_tokens_total", ADAPTER)),
        ),
        Panel(
            title="Sequences passed over per second", unit="ops",
            description="Each waiting sequence counts in each step that passed it over.",
            queries=(by("reason", rate("skips_total")),),
        ),
        Panel(
            title="Slots kept and adapters unloaded per second", unit="ops",
            queries=(Query(total("slot_reservations"), "slots kept"), Query(total("drains"), "unloads")),
        ),
        Panel(
            title="Adapters", kind="table",
            queries=(Query(
                f"loramux_adapter_loaded{{{ADAPTER}}}"
                f" * on (instance, base, adapter) group_left () loramux_adapter_rank{{{ADAPTER}}}"
            ),),
        ),
    ),
)  # fmt: skip

DASHBOARDS = (SERVING, ADAPTER_BOARD)

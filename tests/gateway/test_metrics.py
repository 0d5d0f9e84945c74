"""Names, values and lifetimes of the metrics series."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import AdapterStats, Stats
from gateway.metrics import Metrics
from tests.gateway.fake_engine import model_info

SQL = AdapterStats(
    name="sql",
    tier="arena",
    pinned=True,
    rank=8,
    requests=3,
    prompt_tokens=30,
    generated_tokens=12,
    waiting=1,
    running=2,
)
BASE = AdapterStats(name="", tier="arena", pinned=True, rank=0, requests=5, prompt_tokens=50, generated_tokens=20)


class Clock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    metrics = Metrics(clock)
    metrics.engine_started(model_info())
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Every series by its name and sorted labels, such as `loramux_chunks{use="kv"}`."""
    text = metrics.render()[0].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_gauges_mirror_the_engine(metrics: Metrics) -> None:
    metrics.update(
        Stats(
            running=2, waiting=1, slots_total=8, slots_used=3, slots_pinned=1, resident=4,
            tier_bytes={"arena": 1000, "host": 5000}, chunks={"kv": 5, "prefix": 2, "adapter": 7, "free": 10},
            adapters=[BASE, SQL],
        )
    )  # fmt: skip
    told = samples(metrics)
    wanted = {
        "loramux_requests_running": 2, "loramux_requests_waiting": 1, "loramux_slots": 8, "loramux_slots_used": 3,
        "loramux_slots_pinned": 1, "loramux_adapters_resident": 4, 'loramux_adapter_bytes{tier="host"}': 5000,
        'loramux_chunks{use="prefix"}': 2, "loramux_engine_up": 1,
        'loramux_adapter_loaded{adapter="sql",base="llama",pinned="true",tier="arena"}': 1,
        'loramux_adapter_rank{adapter="sql",base="llama"}': 8,
        'loramux_adapter_requests_running{adapter="sql",base="llama"}': 2,
        'loramux_adapter_requests_waiting{adapter="sql",base="llama"}': 1,
        'loramux_adapter_requests_total{adapter="sql",base="llama"}': 3,
        'loramux_adapter_requests_total{adapter="",base="llama"}': 5,
        'loramux_adapter_prompt_tokens_total{adapter="sql",base="llama"}': 30,
        'loramux_adapter_generated_tokens_total{adapter="sql",base="llama"}': 12,
    }  # fmt: skip
    assert {name: told[name] for name in wanted} == wanted
    assert not any('loaded{adapter=""' in name for name in told)


def test_counters_take_the_engines_names(metrics: Metrics) -> None:
    metrics.update(
        Stats(
            counters={"preemptions": 2, "prefix_hit_tokens": 64, "Bad name": 1},
            evictions={"arena/pressure": 3, "host/limit": 1},
            loads={"source/ok": 4, "device/failed": 1},
        )
    )
    told = samples(metrics)
    assert told["loramux_preemptions_total"] == 2
    assert told["loramux_prefix_hit_tokens_total"] == 64
    assert told['loramux_evictions_total{reason="pressure",tier="arena"}'] == 3
    assert told['loramux_adapter_loads_total{outcome="failed",stage="device"}'] == 1
    assert not any("Bad" in name for name in told)


def test_observations_are_counted_once_each(metrics: Metrics) -> None:
    metrics.update(
        Stats(step_seconds=[0.01, 0.02], step_tokens=[8, 64], queue_seconds=[0.5], load_seconds=[("host", 0.1)])
    )
    metrics.update(Stats())
    told = samples(metrics)
    assert (told["loramux_step_seconds_count"], told["loramux_step_tokens_sum"]) == (2, 72)
    assert told["loramux_queue_seconds_sum"] == 0.5
    assert told['loramux_adapter_load_seconds_count{stage="host"}'] == 1


def test_counters_never_fall_when_the_engine_is_replaced(metrics: Metrics) -> None:
    name = 'loramux_adapter_requests_total{adapter="sql",base="llama"}'
    metrics.update(Stats(counters={"preemptions": 7}, adapters=[SQL], running=3))
    metrics.engine_lost()
    told = samples(metrics)
    assert (told["loramux_engine_up"], told["loramux_engine_losses_total"], told["loramux_requests_running"]) == (
        0,
        1,
        0,
    )
    assert (told["loramux_preemptions_total"], told[name]) == (7, 3)
    metrics.engine_started(model_info())
    assert samples(metrics)["loramux_preemptions_total"] == 7
    metrics.update(Stats(counters={"preemptions": 9}, adapters=[SQL]))  # more than before, and yet a new count
    told = samples(metrics)
    assert (told["loramux_preemptions_total"], told[name], told["loramux_engine_up"]) == (16, 6, 1)


def test_a_count_that_falls_by_itself_goes_on(metrics: Metrics) -> None:
    metrics.update(Stats(counters={"preemptions": 7}))
    metrics.update(Stats(counters={"preemptions": 2}))
    assert samples(metrics)["loramux_preemptions_total"] == 9


def test_latencies_follow_a_choice(metrics: Metrics, clock: Clock) -> None:
    timer = metrics.request_started("llama", "sql")
    clock.now += 0.3
    timer.first_token()
    timer.tokens(1)
    clock.now += 0.02
    timer.tokens(1)
    clock.now += 0.06
    timer.tokens(3)
    timer.finished("stop", 10, 5)
    metrics.request_started("llama", "sql").finished("abort", 0, 0)
    told = samples(metrics)
    labels = '{adapter="sql",base="llama"}'
    assert told[f"loramux_time_to_first_token_seconds_sum{labels}"] == pytest.approx(0.3)
    assert told[f"loramux_inter_token_latency_seconds_count{labels}"] == 4
    assert told[f"loramux_inter_token_latency_seconds_sum{labels}"] == pytest.approx(0.08)
    assert told[f"loramux_request_seconds_count{labels}"] == 1
    assert told[f"loramux_request_seconds_sum{labels}"] == pytest.approx(0.38)
    assert told['loramux_request_prompt_tokens_count{base="llama"}'] == 1
    assert told['loramux_request_generated_tokens_sum{base="llama"}'] == 5
    assert told['loramux_requests_finished_total{base="llama",reason="abort"}'] == 1


def test_an_adapters_series_go_with_it(metrics: Metrics, clock: Clock) -> None:
    timer = metrics.request_started("llama", "sql")
    timer.first_token()
    metrics.request_started("llama", "").first_token()
    metrics.update(Stats(adapters=[BASE, SQL]))
    assert any('adapter="sql"' in name for name in samples(metrics))
    metrics.update(Stats(adapters=[BASE]))
    timer.tokens(1)
    timer.finished("abort", 1, 1)  # its last request ends later
    told = samples(metrics)
    assert not any('adapter="sql"' in name for name in told)
    assert 'loramux_time_to_first_token_seconds_count{adapter="",base="llama"}' in told
    metrics.request_started("llama", "sql").first_token()  # loaded again under its name
    assert samples(metrics)['loramux_time_to_first_token_seconds_count{adapter="sql",base="llama"}'] == 1


def test_an_adapter_that_a_restart_lost_leaves_nothing(metrics: Metrics) -> None:
    metrics.update(Stats(adapters=[BASE, SQL]))
    metrics.engine_lost()
    metrics.engine_started(model_info())
    metrics.update(Stats(adapters=[BASE]))
    assert not any('adapter="sql"' in name for name in samples(metrics))


def test_an_adapter_newer_than_the_engines_last_word_is_spared(metrics: Metrics) -> None:
    metrics.request_started("llama", "new").first_token()
    metrics.update(Stats(adapters=[BASE]))  # sent before the load
    assert any('adapter="new"' in name for name in samples(metrics))
    metrics.update(Stats(adapters=[BASE]))
    assert not any('adapter="new"' in name for name in samples(metrics))


def test_names_keep_prometheus_conventions(metrics: Metrics) -> None:
    metrics.update(Stats(adapters=[BASE, SQL], counters={"preemptions": 1}))
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        assert family.name.startswith("loramux_")
        assert family.documentation
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert not sample.name.endswith("_created")


def test_counters_begin_at_zero(metrics: Metrics) -> None:
    told = samples(metrics)
    assert told["loramux_prefetch_hits_total"] == told["loramux_graph_replays_total"] == 0


def test_the_queues_age_the_steps_sizes_and_skips_by_reason(metrics: Metrics) -> None:
    metrics.update(Stats(queue_age=2.5, step_sequences=[3, 4], counters={"skips_no_slot": 2, "skips_not_resident": 5}))
    told = samples(metrics)
    assert told["loramux_queue_age_seconds"] == 2.5
    assert (told["loramux_step_sequences_count"], told["loramux_step_sequences_sum"]) == (2, 7)
    assert told['loramux_skips_total{reason="no_slot"}'] == 2
    assert told['loramux_skips_total{reason="not_resident"}'] == 5

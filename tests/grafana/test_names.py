"""Dashboards and alerts name only what the server exports, and are what their generator writes."""

import subprocess
import sys
from collections.abc import Mapping

import pytest
import yaml

from tests.grafana.exported import SCRAPED, series_labels
from tests.grafana.promql import FOLDER, Named, alert_queries, dashboards, panel_queries, variable_queries

PANELS = panel_queries()
QUERIES = [*PANELS, *alert_queries(), *(query for query, _ in variable_queries())]
WANTED = {
    "Slot pool", "Residency by tier", "Hits and misses per second", "Evictions per second",
    "Load seconds, p95 by stage", "Queue by adapter", "Time to first token by adapter, p95", "Arena by use",
}  # fmt: skip


@pytest.fixture(scope="module")
def labels() -> Mapping[str, frozenset[str]]:
    return {**series_labels(), "up": SCRAPED}


def unknown(query: Named, labels: Mapping[str, frozenset[str]]) -> list[str]:
    """What a query names that nobody exports."""
    series = query.selectors()
    wrong = [name for name, _ in series if name not in labels]
    wrong += [f"{name}{{{label}}}" for name, used in series for label in used - labels.get(name, frozenset())]
    known = frozenset().union(*(labels.get(name, frozenset()) for name, _ in series))
    return wrong + sorted((query.grouping() | query.shown) - known)


@pytest.mark.parametrize("query", QUERIES, ids=[query.where for query in QUERIES])
def test_every_query_names_what_is_exported(query: Named, labels: Mapping[str, frozenset[str]]) -> None:
    assert query.selectors()
    assert unknown(query, labels) == []


@pytest.mark.parametrize(
    ("expr", "wrong"),
    [
        ("rate(loramux_nothing_total[5m])", ["loramux_nothing_total"]),
        ("loramux_time_to_first_token_seconds", ["loramux_time_to_first_token_seconds"]),
        ('loramux_slots{tier="arena"}', ["loramux_slots{tier}"]),
        ("sum by (reason) (loramux_chunks)", ["reason"]),
        ('sum by (use) (loramux_chunks{use="kv"}) / on (job) up', []),
    ],
)
def test_what_is_not_exported_is_found(expr: str, wrong: list[str], labels: Mapping[str, frozenset[str]]) -> None:
    assert unknown(Named("test", expr), labels) == wrong


def test_variables_take_labels_that_exist(labels: Mapping[str, frozenset[str]]) -> None:
    assert {label for _, label in variable_queries()} == {"instance", "base", "adapter"}
    for query, label in variable_queries():
        ((name, _),) = query.selectors()
        assert label in labels[name], query.where


def test_the_dashboards_are_fresh() -> None:
    command = [sys.executable, str(FOLDER / "make_dashboards.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_dashboards_show_what_they_must() -> None:
    boards = dashboards()
    assert set(boards) == {"serving.json", "adapters.json"}
    assert {panel["title"] for panel in boards["adapters.json"]["panels"]} >= WANTED
    for board in boards.values():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))
        (arena,) = [panel for panel in board["panels"] if panel["title"] == "Arena by use"]
        assert arena["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"


def test_panels_do_not_overlap() -> None:
    for board in dashboards().values():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24
            taken |= cells


def test_provisioning_and_compose_point_at_what_is_there() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in compose["volumes"]
    provider = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "loramux.yaml").read_text(encoding="utf-8"))
    mounted = "./dashboards:" + provider["providers"][0]["options"]["path"] + ":ro"
    assert mounted in compose["services"]["grafana"]["volumes"]
    source = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    address = source["datasources"][0]["url"].removeprefix("http://")
    assert f"--web.listen-address={address}" in compose["services"]["prometheus"]["command"]

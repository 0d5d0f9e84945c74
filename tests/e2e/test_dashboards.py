"""A real Prometheus scrapes a real server: after a small load every query of every dashboard and alert has its data."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import Server, generate, load, unload
from tests.grafana.exported import SCRAPED, families, metric_labels
from tests.grafana.promql import RULES, alert_queries, panel_queries, variable_queries
from tests.grafana.tools import Prometheus, prometheus
from tests.support.programs import program

ADAPTERS = ("lora0", "lora1", "guest")
PROMPT = "name three countries and their capitals, one a line, and nothing else"


@pytest.fixture
def scraper(server: Server, tmp_path: Path) -> Iterator[Prometheus]:
    program("prometheus", package="prometheus")
    with prometheus(tmp_path, server.url.removeprefix("http://"), RULES) as scraper:
        scraper.until("loramux_engine_up")
        yield scraper


async def small_load(client: httpx.AsyncClient) -> None:
    """The base and three adapters at once, one of them twice with the same prompt, so that a prefix is found."""
    names = (None, *ADAPTERS)
    await asyncio.gather(*(generate(client, f"{name}: {PROMPT}", name) for name in names))
    await generate(client, f"guest: {PROMPT}", "guest")


def finite(series: list[Any]) -> list[Any]:
    return [one for one in series if math.isfinite(float(one["value"][1]))]


async def test_every_query_has_data_after_a_small_load(
    server: Server, client: httpx.AsyncClient, files: Files, scraper: Prometheus
) -> None:
    await load(client, "guest", files.rank4)
    await small_load(client)
    scraper.until('loramux_time_to_first_token_seconds_count{adapter="guest"} >= 2')
    await small_load(client)  # rates need a series before and after
    scraper.until('loramux_time_to_first_token_seconds_count{adapter="guest"} >= 4')
    queries = panel_queries()
    empty = [query.where for query in queries if not finite(scraper.query(query.runnable()))]
    assert empty == []
    assert len(queries) > 50
    for query, label in variable_queries():
        assert all(label in series for series in scraper.series(query.runnable()))
    for alert in alert_queries():
        scraper.query(alert.runnable())  # is understood
    names = {rule["name"] for rule in scraper.rules() if rule["health"] in ("ok", "unknown")}
    assert names == {alert.where for alert in alert_queries()}

    await unload(client, "guest")
    scraper.until('absent(loramux_adapter_loaded{adapter="guest"})')
    assert scraper.query('{adapter="guest"}') == []


async def test_a_real_server_exports_what_is_documented_and_nothing_else(client: httpx.AsyncClient) -> None:
    known = metric_labels()
    await generate(client, PROMPT, "lora0")
    told = families((await client.get("/metrics")).text)
    for family in told:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels <= known[name] | SCRAPED, name
    assert {family.name for family in told} == {family.name for family in families()}

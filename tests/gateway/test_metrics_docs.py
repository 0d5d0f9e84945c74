"""docs/metrics.md names exactly what is exported, and every counter of the engine is one that the gateway knows."""

import re
from pathlib import Path

from gateway.engine_metrics import COUNTER_HELP, NOTHING_YET, SKIPS
from tests.grafana.exported import families, metric_labels

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| `(loramux_\w+)` \| (\w+) \|([^|]*)\| ([^|]+) \|")
COUNTED = re.compile(r'(?:_count\[|(?:recorder|counters|_count)\.add\(\s*)"(\w+)"')


def rows() -> list[tuple[str, str, frozenset[str], str]]:
    """Name, type, labels and meaning of every line of the page's tables."""
    found = ROW.findall((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))
    return [(name, kind, frozenset(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in found]


def test_the_page_names_every_metric_with_its_labels_and_nothing_else() -> None:
    documented = {name: labels for name, _, labels, _ in rows()}
    assert documented == metric_labels()
    assert len(rows()) == len(documented)


def test_the_page_tells_the_types() -> None:
    types = {f"{family.name}_total" if family.type == "counter" else family.name: family.type for family in families()}
    assert {name: kind for name, kind, _, _ in rows()} == types


def test_the_page_tells_the_values_of_labels_that_name_causes() -> None:
    text = {name: meaning for name, _, _, meaning in rows()}
    for metric in ("evictions", "skips", "adapter_loads"):
        values = {value for labels in NOTHING_YET[metric] for value in labels}
        missing = [value for value in values if f"`{value}`" not in text[f"loramux_{metric}_total"]]
        assert missing == [], metric


def test_the_gateway_knows_every_counter_of_the_engine() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "engine").rglob("*.py")]
    counted = {name for source in sources for name in COUNTED.findall(source)}
    assert {"preemptions", "drains", "steps", "adapter_hits"} <= counted
    assert {name for name in counted if not name.startswith(SKIPS)} <= set(COUNTER_HELP)

"""What is drawn of the dashboards is what Prometheus said, and every picture that the docs show is there."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from docs.panel_pictures import draw, panels_of

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def board(kind: str = "timeseries", unit: str = "short", stacking: str = "none", legend: str = "{{use}}") -> Any:
    defaults = {"unit": unit, "custom": {"stacking": {"mode": stacking}}}
    panel = {
        "title": "A & B",
        "type": kind,
        "gridPos": {"x": 0, "y": 0, "w": 8, "h": 8},
        "fieldConfig": {"defaults": defaults},
        "targets": [{"expr": "q", "legendFormat": legend}],
    }
    return {"title": "board", "panels": [panel]}


def series(use: str, *values: tuple[float, str]) -> dict[str, Any]:
    return {"metric": {"use": use}, "values": [list(value) for value in values]}


def drawn(board: Any, *answer: dict[str, Any]) -> ElementTree.Element:
    svg, _, _ = draw(board["title"], panels_of(board, lambda expr: list(answer)), (0.0, 10.0))
    return ElementTree.fromstring(svg)


def texts(root: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in root.iter(f"{SVG}text")]


def lines(root: ElementTree.Element, tag: str) -> list[int]:
    """Points of each line or area."""
    return [len(node.attrib["points"].split()) for node in root.iter(f"{SVG}{tag}")]


def test_series_are_lines_with_their_names_and_last_values() -> None:
    root = drawn(board(), series("kv", (0, "1"), (1, "3")), series("free", (0, "2"), (1, "150")))
    assert {"A & B", "kv 3", "free 150"} <= set(texts(root))
    assert lines(root, "polyline") == [2, 2]


def test_nothing_is_drawn_across_a_gap_or_for_what_is_no_number() -> None:
    root = drawn(board(), series("kv", (0, "1"), (1, "1"), (2, "NaN"), (3, "+Inf"), (4, "1"), (5, "1"), (6, "1")))
    assert lines(root, "polyline") == [2, 3]


def test_stacked_series_stand_on_each_other() -> None:
    root = drawn(board(stacking="normal"), series("kv", (0, "1"), (1, "1")), series("free", (0, "1"), (1, "1")))
    first, second = (n.attrib["points"].split() for n in root.iter(f"{SVG}polygon"))
    assert first[:2] == second[:1:-1]  # the upper line of one is the lower line of the next


def test_a_panel_without_series_says_so() -> None:
    assert "no data" in texts(drawn(board()))
    assert "no data" in texts(drawn(board(), series("kv", (0, "NaN"))))


def test_a_label_that_is_missing_is_empty_and_units_are_written() -> None:
    assert "a: 250 ms" in texts(drawn(board(unit="s", legend="a:{{nothing}}"), series("kv", (0, "0.25"))))
    assert "a 25 %" in texts(drawn(board(unit="percentunit", legend="a"), series("kv", (0, "0.25"))))
    assert "3 MiB" in " ".join(texts(drawn(board(unit="bytes", legend="a"), series("kv", (0, "3145728")))))


@pytest.mark.parametrize("page", ["README.md", "docs/page.md"])
def test_every_picture_that_is_shown_is_kept(page: str) -> None:
    file = ROOT / page
    shown = re.findall(r"!\[[^]]*]\(([^)]+)\)", file.read_text(encoding="utf-8"))
    assert shown
    assert [name for name in shown if not (file.parent / name).is_file()] == []


def test_pictures_are_small() -> None:
    assert sum(picture.stat().st_size for picture in PICTURES.iterdir()) < 600_000

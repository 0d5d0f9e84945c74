"""Writes the dashboards from panels.py: `python grafana/make_dashboards.py`. A test fails where one is stale.

With `--check` it writes nothing and fails where a file differs.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from panels import DASHBOARDS, Board, Panel, Query

Json = dict[str, Any]

FOLDER = Path(__file__).with_name("dashboards")
WIDTH = 24  # Grafana's columns
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
ALL = ".*"  # also matches the empty name, which is the base's


def dashboard(board: Board) -> Json:
    """The whole model as Grafana reads it from a file."""
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.description,
        "tags": ["loramux"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["loramux"], "title": "loramux", "asDropdown": False}],
        "templating": {"list": list(_variables(board))},
        "panels": list(_placed(board.panels)),
    }


def _variables(board: Board) -> Iterator[Json]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    for name, label, query in board.variables:
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ALL,
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _placed(panels: Iterable[Panel]) -> Iterator[Json]:
    """From left to right, a new line where the width is used up."""
    x = y = line = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > WIDTH:
            x, y, line = 0, y + line, 0
        yield _panel(panel, number) | {"gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height}}
        x, line = x + panel.width, max(line, panel.height)


def _panel(panel: Panel, number: int) -> Json:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "targets": [_target(query, chr(ord("A") + i), panel) for i, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        **_options(panel),
    }


def _target(query: Query, ref: str, panel: Panel) -> Json:
    instant: Json = {"instant": True, "range": False, "format": "table"} if panel.kind == "table" else {}
    return {"refId": ref, "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend, **instant}


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal"} if panel.stacked else {"mode": "none"}
        defaults["custom"] = {"fillOpacity": 60 if panel.stacked else 8, "stacking": stacking, "showPoints": "never"}
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    return defaults


def _options(panel: Panel) -> Json:
    match panel.kind:
        case "timeseries":
            legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
            return {"options": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}}
        case "stat":
            return {"options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}}
        case _:
            hidden = dict.fromkeys(("Time", "__name__", "job", "instance"), True)
            names = {"Value": "rank"}
            return {
                "transformations": [{"id": "organize", "options": {"excludeByName": hidden, "renameByName": names}}]
            }


def render(board: Board) -> str:
    """The file's text."""
    return json.dumps(dashboard(board), indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check = parser.parse_args().check
    stale = 0
    for board in DASHBOARDS:
        target, text = FOLDER / f"{board.name}.json", render(board)
        if not check:
            target.write_text(text, encoding="utf-8")
        elif target.read_text(encoding="utf-8") != text:
            print(f"{target.name} is stale: run `make dashboards`", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())

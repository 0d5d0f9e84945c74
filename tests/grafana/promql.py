"""Reads dashboards, alerts and their PromQL as far as tests need it: which series and labels a query names."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "grafana"
RULES = FOLDER / "alerts" / "loramux.yaml"
SELECTOR = re.compile(r"(?<![\w$])(loramux_\w+|up)\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
LABEL_VALUES = re.compile(r"label_values\((.*),\s*(\w+)\)")
LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
QUOTED = re.compile(r'"[^"]*"')
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*", "$base": ".*", "$adapter": ".*"}


@dataclass(frozen=True)
class Named:
    """A query, where it stands, and the labels that its legend or text shows."""

    where: str
    expr: str
    shown: frozenset[str] = frozenset()

    def selectors(self) -> list[tuple[str, frozenset[str]]]:
        """Each series that is named, with the labels that select of it."""
        return [(name, frozenset(MATCHER.findall(QUOTED.sub("", inner)))) for name, inner in self._selectors()]

    def grouping(self) -> frozenset[str]:
        """Labels of `by`, `on` and their like."""
        found = GROUPING.findall(self.expr)
        return frozenset(label.strip() for group in found for label in group.split(",") if label.strip())

    def runnable(self) -> str:
        """The query with Grafana's variables replaced by what they hold where all is chosen."""
        expr = self.expr
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        return expr

    def _selectors(self) -> Iterator[tuple[str, str]]:
        yield from ((match[1], match[2] or "") for match in SELECTOR.finditer(self.expr))


def dashboards() -> dict[str, Any]:
    """By file name."""
    files = sorted((FOLDER / "dashboards").glob("*.json"))
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def panel_queries() -> list[Named]:
    """Every query of every panel."""
    return [
        Named(f"{name}: {panel['title']}", target["expr"], frozenset(LEGEND.findall(target["legendFormat"])))
        for name, board in dashboards().items()
        for panel in board["panels"]
        for target in panel["targets"]
    ]


def variable_queries() -> list[tuple[Named, str]]:
    """What fills the variables: a selector, and the label whose values are taken."""
    found = []
    for name, board in dashboards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                match = LABEL_VALUES.fullmatch(variable["query"]["query"])
                assert match, variable
                found.append((Named(f"{name}: ${variable['name']}", match[1]), match[2]))
    return found


def alert_queries() -> list[Named]:
    """Every rule's expression; its texts show labels too."""
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]
    return [
        Named(rule["alert"], rule["expr"], frozenset(LEGEND.findall(" ".join(rule["annotations"].values()))))
        for rule in rules
    ]

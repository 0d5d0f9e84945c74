"""Draws what a dashboard's queries returned as one SVG, each panel where the dashboard has it; for make_pictures."""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CELL = 60  # pixels of one of the dashboard's 24 columns
ROW = 34  # pixels of one of its rows
MARGIN = 7
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 74  # around a plot
LEGEND_LINES = 3
GAP = 1.5  # seconds without a value
COLORS = (
    "#2f6cab", "#c98722", "#2b7d4f", "#b3302c", "#7a5ba8", "#3d9aa5", "#a2567f", "#7f8a2e", "#5b6b7b", "#d17350",
)  # fmt: skip
STYLE = (
    "text{font:12px Inter,system-ui,sans-serif;fill:#1b1f23}.title{font-weight:600;font-size:13px}"
    ".small{fill:#62696f;font-size:11px}.big{font-size:34px;font-weight:600}"
)

Layer = tuple[float, float, float]  # seconds, from, to


@dataclass(frozen=True)
class Series:
    """One series of one query, as the panel's legend calls it."""

    name: str
    points: list[tuple[float, float]]  # (seconds, value), finite


@dataclass(frozen=True)
class Panel:
    """Where a panel stands, how it is drawn and what its queries returned."""

    title: str
    kind: str  # stat | timeseries | table
    unit: str
    stacked: bool
    at: dict[str, int]  # Grafana's gridPos
    series: list[Series]


def draw(title: str, panels: Sequence[Panel], span: tuple[float, float]) -> tuple[str, int, int]:
    """The SVG with its width and height. `span`: from when to when, in unix seconds."""
    width = 24 * CELL
    height = max(panel.at["y"] + panel.at["h"] for panel in panels) * ROW + 46
    parts = [f'<text class="title" x="{MARGIN}" y="26" style="font-size:17px">{html.escape(title)}</text>']
    for panel in panels:
        x, y = panel.at["x"] * CELL, panel.at["y"] * ROW + 42
        parts.append(f'<g transform="translate({x},{y})">{_panel(panel, span)}</g>')
    frame = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    ground = '<rect width="100%" height="100%" fill="#f4f4f1"/>'
    return f"<svg {frame}><style>{STYLE}</style>{ground}{''.join(parts)}</svg>", width, height


def _panel(panel: Panel, span: tuple[float, float]) -> str:
    width, height = panel.at["w"] * CELL - MARGIN, panel.at["h"] * ROW - MARGIN
    box = f'<rect width="{width}" height="{height}" rx="6" fill="#fff" stroke="#dfdfd9"/>'
    title = f'<text class="title" x="12" y="22">{html.escape(panel.title)}</text>'
    shown = [series for series in panel.series if series.points]
    if not shown:
        return f'{box}{title}<text class="small" x="12" y="{height // 2}">no data</text>'
    inner: dict[str, Callable[[], str]] = {
        "stat": lambda: (
            f'<text class="big" x="12" y="{height - 30}">{_text(shown[0].points[-1][1], panel.unit)}</text>'
        ),
        "table": lambda: _table(shown, height),
        "timeseries": lambda: _plot(panel, shown, span, width, height),
    }
    return box + title + inner[panel.kind]()


def _table(shown: list[Series], height: int) -> str:
    lines = (height - 50) // 18
    now = max(series.points[-1][0] for series in shown)
    rows = sorted(series.name for series in shown if series.points[-1][0] == now)
    texts = rows if len(rows) <= lines else [*rows[: lines - 1], f"and {len(rows) - lines + 1} more"]
    return "".join(
        f'<text class="small" x="12" y="{46 + 18 * i}">{html.escape(text)}</text>' for i, text in enumerate(texts)
    )


def _plot(panel: Panel, shown: list[Series], span: tuple[float, float], width: int, height: int) -> str:
    shown = sorted(shown, key=lambda series: -sum(value for _, value in series.points)) if len(shown) > 4 else shown
    layers = _stack(shown) if panel.stacked else [[(at, 0.0, value) for at, value in one.points] for one in shown]
    unit = 2**20 if panel.unit == "bytes" else 1
    top = unit * _nice(max((high for layer in layers for _, _, high in layer), default=0.0) / unit)
    plot_width, plot_height = width - LEFT - RIGHT, height - TOP - BOTTOM

    def place(at: float, value: float) -> str:
        x = LEFT + plot_width * (at - span[0]) / (span[1] - span[0])
        return f"{x:.1f},{TOP + plot_height * (1 - value / top):.1f}"

    parts = [_grid(panel.unit, top, width, plot_height, span)]
    for index, layer in enumerate(layers):
        color = COLORS[index % len(COLORS)]
        for run in _runs(layer):
            line = " ".join(place(at, high) for at, _, high in run)
            if panel.stacked:
                under = " ".join(place(at, low) for at, low, _ in reversed(run))
                parts.append(f'<polygon points="{line} {under}" fill="{color}" fill-opacity="0.75"/>')
            else:
                parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    return "".join(parts) + _legend(shown, panel.unit, width, height)


def _stack(shown: list[Series]) -> list[list[Layer]]:
    """Each series on those before it."""
    ground: dict[float, float] = {}
    layers = []
    for series in shown:
        layers.append([(at, ground.get(at, 0.0), ground.get(at, 0.0) + value) for at, value in series.points])
        ground |= {at: high for at, _, high in layers[-1]}
    return layers


def _runs(layer: list[Layer]) -> list[list[Layer]]:
    """The parts between which there is no value: nothing is drawn across a gap."""
    runs: list[list[Layer]] = []
    for point in layer:
        if not runs or point[0] - runs[-1][-1][0] > GAP:
            runs.append([])
        runs[-1].append(point)
    return runs


def _grid(unit: str, top: float, width: int, plot_height: int, span: tuple[float, float]) -> str:
    parts = []
    for step in range(5):
        y = TOP + plot_height * (1 - step / 4)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}" stroke="#e6e6e0"/>')
        label = _text(top * step / 4, unit)
        parts.append(f'<text class="small" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for share in (0.0, 0.5, 1.0):
        x, seconds = LEFT + (width - LEFT - RIGHT) * share, (1 - share) * (span[1] - span[0])
        label = "now" if share == 1 else f"-{seconds:.0f} s"
        parts.append(f'<text class="small" x="{x}" y="{TOP + plot_height + 16}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _legend(shown: list[Series], unit: str, width: int, height: int) -> str:
    """Each series with its last value, as far as there is room, and how many more there are."""
    parts, x, line = [], 12.0, 0
    for index, series in enumerate(shown):
        text = f"{series.name} {_text(series.points[-1][1], unit)}"
        size = 24 + 6.4 * len(text)
        is_last_line = line == LEGEND_LINES - 1
        is_full = x + size > width - (60 if is_last_line else 12)
        if is_full and not is_last_line:
            x, line = 12.0, line + 1
        y = height - 46 + 17 * line
        if is_full and is_last_line:
            parts.append(f'<text class="small" x="{x}" y="{y}">+ {len(shown) - index}</text>')
            break
        parts.append(f'<rect x="{x}" y="{y - 8}" width="9" height="9" rx="2" fill="{COLORS[index % len(COLORS)]}"/>')
        parts.append(f'<text class="small" x="{x + 14}" y="{y}">{html.escape(text)}</text>')
        x += size
    return "".join(parts)


def _nice(value: float) -> float:
    """The next round number, so that four lines of the grid have short labels."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value)


def _text(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def panels_of(board: dict[str, Any], ask: Callable[[str], list[Any]]) -> list[Panel]:
    """A dashboard's panels with what `ask` returns for each query: Prometheus' series with their `values`."""
    return [
        Panel(
            title=panel["title"],
            kind=panel["type"],
            unit=panel["fieldConfig"]["defaults"].get("unit", "short"),
            stacked=panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal",
            at=panel["gridPos"],
            series=[
                _series(one, target["legendFormat"], panel["type"])
                for target in panel["targets"]
                for one in ask(target["expr"])
            ],
        )
        for panel in board["panels"]
    ]


def _series(one: dict[str, Any], legend: str, kind: str) -> Series:
    labels = one["metric"]
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    legend = re.sub(r"{{\w+}}", "", legend)  # a label that a series lacks is empty, as Grafana has it
    if kind == "table":
        pinned = ", pinned" if labels.get("pinned") == "true" else ""
        legend = f"{labels['base']}:{labels['adapter']}: {labels['tier']}{pinned}"
    points = [(float(at), float(value)) for at, value in one["values"]]
    return Series(legend, [(at, value) for at, value in points if math.isfinite(value)])

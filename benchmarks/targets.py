"""The speeds that loramux is to reach, beside what kept runs measured: `make targets`.

    python -m benchmarks.targets [--folder benchmarks/results]

A value comes from one run: a row's median, or one row over another of the same run. Runs on the CARD go first, newer
ones before older ones; a run without an accelerator never counts.
"""

import argparse
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import OVER_BASE, SHORT

CARD = "H200"
HEADER = ("what", "measured", "wanted", "", "card", "commit", "date")
OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, slots=True)
class Target:
    """`row`, over the row `over` where one is named, is to be `sense` (of OPERATORS) `bound`, in `unit`.

    Where a run measured the two in turns, in the row `turns`, that is taken.
    """

    what: str
    row: str
    sense: str
    bound: float
    unit: str = "x"
    over: str = ""
    turns: str = ""
    absolute: bool = False  # a figure of the CARD: on another card it is told, not judged


@dataclass(frozen=True, slots=True)
class Run:
    """One kept report."""

    date: str
    commit: str
    card: str
    medians: dict[str, float]

    def value(self, target: Target) -> float | None:
        """None where the run has no such rows."""
        if target.turns in self.medians:
            return self.medians[target.turns]
        if target.row not in self.medians or (target.over and target.over not in self.medians):
            return None
        return self.medians[target.row] / (self.medians[target.over] if target.over else 1.0)


def _over_base(adapters: int, rank: int, batch: int, bound: float) -> Target:
    row = f"{adapters} adapters r{rank}, batch {batch}"
    what = f"{row.replace('1 adapters', '1 adapter')}, over base"
    return Target(what, row, "<=", bound, over=f"base, batch {batch}", turns=f"{row}{OVER_BASE}")


TARGETS = (
    *(
        Target(f"base, batch {batch}, over the floor", f"base, batch {batch}: over the floor", "<=", 1.10)
        for batch in (1, 8, 32, 64, 128)
    ),
    Target(
        "base, batch 128, context 1,104, over the floor", "base, batch 128, context 1104: over the floor", "<=", 1.12
    ),
    *(
        Target(f"LoRA idle over disabled, batch {n}", f"base, batch {n}: LoRA on, idle over LoRA off", "<=", 1.005)
        for n in (1, 32)
    ),
    _over_base(1, 16, 1, 1.03),
    *(_over_base(8, 16, batch, 1.07) for batch in (8, 32, 64, 128)),
    _over_base(32, 16, 64, 1.18),
    _over_base(8, 64, 32, 1.20),
    Target("64 slots configured over 8", "8 adapters r16, batch 32: 64 slots over 8 slots", "<=", 1.02),
    Target("prefill 8 x 1,024, base", "prefill 8 x 1024, base, 8192 a step", ">=", 44_000, "tokens/s", absolute=True),
    Target(
        "prefill 8 x 1,024, 8 adapters", "prefill 8 x 1024, 8 adapters r16, 8192 a step", ">=", 41_000, "tokens/s",
        absolute=True,
    ),
    *(
        Target(
            f"512 requests at once, {name}, in + out", f"512 requests (512 in, 128 out) at once, {row}", ">=", bound,
            "tokens/s", absolute=True,
        )
        for name, row, bound in (
            ("base", "base", 37_000),
            ("8 adapters", "8 adapters r16", 34_500),
            ("64 adapters Zipf 1.0", "64 adapters r16 Zipf 1.0, 64 slots", 33_000),
        )
    ),
    Target(
        "online, 70 % load, Poisson: median gap over the pure step",
        "online, Poisson, 70% load: median gap over the pure decode step of its batch", "<=", 1.3,
    ),
    Target(
        "load of an adapter r16 over a pinned copy", "adapter r16, host to arena", "<=", 1.3,
        over="pinned copy of the same bytes",
    ),
    Target(
        "99th percentile of other streams' gaps while 100 load",
        "cold start: 99th percentile of the streams' gaps, host loads less none", "<", 2.0, "ms more",
    ),
    Target("1,000 adapters, arena capped over uncapped", "arena capped over uncapped, throughput", ">=", 0.9),
    *(
        Target(f"the same, {what} in the capped arena",
               f"1000 adapters r16 qkvo, Zipf 1.0, capped arena: {what}", ">", 0, "times")
        for what in ("loads", "evictions")
    ),
    Target("S-LoRA's trace, n = 2000 over n = 5", "S-LoRA's trace, n = 2000 over n = 5", ">=", 0.95),
    *(
        Target(f"gap on the device between two steps, {what}", f"{what}, batch 32: gap between steps", "<", 3.0, "%")
        for what in ("base", "8 adapters r16")
    ),
    Target("start with graphs, random weights", "start, random weights, graphs", "<=", 25.0, "s", absolute=True),
)  # fmt: skip


def read_runs(folder: Path) -> list[Run]:
    """Every kept report of an accelerator, the CARD's first, then newest first."""
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    runs = [_run(report) for report in kept if isinstance(report, dict) and _card(report)]
    runs.sort(key=lambda run: run.date, reverse=True)
    return sorted(runs, key=lambda run: CARD not in run.card)


def _card(report: dict[str, Any]) -> str | None:
    """None for what is no run of a benchmark's whole form on an accelerator."""
    if not {"name", "machine", "rows"} <= report.keys() or report["name"].endswith(SHORT):
        return None
    card: str | None = report["machine"]["accelerator"]
    return card


def _run(report: dict[str, Any]) -> Run:
    medians = {row["name"]: float(row["median"]) for row in report["rows"] if "median" in row}
    return Run(report["date"], report["commit"], _card(report) or "", medians)


def table(runs: Iterable[Run]) -> list[tuple[str, ...]]:
    """One line a target."""
    every = list(runs)
    return [HEADER, *(_line(target, every) for target in TARGETS)]


def _line(target: Target, runs: Sequence[Run]) -> tuple[str, ...]:
    wanted = f"{target.sense} {target.bound:g} {target.unit}"
    for run in runs:
        if (value := run.value(target)) is not None:
            measured = f"{value:.4g} {target.unit}" if value < 10_000 else f"{value:,.0f} {target.unit}"
            return target.what, measured, wanted, verdict(target, value, run.card), run.card, run.commit, run.date[:10]
    return target.what, "", wanted, "no measurement", "", "", ""


def verdict(target: Target, value: float, card: str) -> str:
    """Met, or short by how much of the bound."""
    if target.absolute and CARD not in card:
        return f"the target is for the {CARD}"
    if OPERATORS[target.sense](value, target.bound):
        return "met"
    off = abs(value - target.bound)
    return f"short by {off / target.bound:.1%}" if target.bound else "short"


def show(lines: Sequence[Sequence[str]]) -> str:
    """As a table of Markdown, its columns in line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    print(show(table(read_runs(parser.parse_args(argv).folder))))


if __name__ == "__main__":
    main()

"""The one report format of every benchmark: rows with median and spread, printed as a table and kept as JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

SHORT = "-tiny"  # ends the name of a short form's report, which no figure is taken from
OVER_BASE = ": over the base in turns"  # behind the name of a case with adapters
_PACKAGES = ("torch", "triton", "transformers", "peft", "starlette", "uvicorn", "loramux")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured thing. `values` are single runs, in `unit`; `target` is a bound on the median, as text."""

    name: str
    unit: str
    values: tuple[float, ...]
    target: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        return f"{min(self.values):.4g} .. {max(self.values):.4g}" if len(self.values) > 1 else "one run"


@dataclass(slots=True)
class Report:
    """Grows row by row, printing each as it comes; with a folder each is kept at once, whatever ends the run."""

    name: str
    commit: str = ""
    rows: list[Row] = field(default_factory=list)
    folder: Path | None = None

    def add(self, name: str, unit: str, values: Sequence[float], target: str = "", note: str = "") -> Row:
        row = Row(name, unit, tuple(values), target, note)
        self.rows.append(row)
        print(f"{name:<58} {row.median:>9.4g} {unit:<9} [{row.spread}] {target} {note}".rstrip(), flush=True)
        if self.folder is not None:
            self.save(self.folder)
        return row

    def save(self, folder: Path) -> Path:
        """Writes `<folder>/<name>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        rows = [{**asdict(row), "median": row.median} for row in self.rows]
        text = json.dumps({"name": self.name, **environment(self.commit), "rows": rows}, indent=1) + "\n"
        whole = path.with_suffix(".part")  # a run that is killed while it writes leaves the last whole file
        whole.write_text(text)
        whole.replace(path)
        return path


def asked(name: str, description: str | None, argv: Sequence[str] | None) -> tuple[Report, bool]:
    """The report of a benchmark that may be asked for its short form and nothing else, and whether it is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="", help="the commit to name, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="the short form: shows that it runs")
    arguments = parser.parse_args(argv)
    report = Report(name + (SHORT if arguments.tiny else ""), arguments.commit, folder=arguments.folder)
    return report, arguments.tiny


def environment(commit: str = "") -> dict[str, object]:
    """Machine, versions, commit and date of a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "accelerator": _accelerator()},
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
    }


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

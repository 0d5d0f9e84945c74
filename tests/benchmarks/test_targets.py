"""The table of targets: one run's figures, the right run, met or short by how much."""

import json
from pathlib import Path

import pytest

from benchmarks.compare import FULL as COMPARE
from benchmarks.report import Report
from benchmarks.steps import FULL as STEPS
from benchmarks.targets import TARGETS, Target, main, read_runs, table, verdict
from benchmarks.whole import FULL


def keep(folder: Path, name: str, card: str | None, date: str, rows: dict[str, float]) -> None:
    """A report as it is kept, told to be of another machine and day."""
    report = Report(name, "abc1234")
    for row, value in rows.items():
        report.add(row, "x", [value])
    path = report.save(folder)
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "date": date, "machine": {**kept["machine"], "accelerator": card}}))


def line(folder: Path, what: str) -> tuple[str, ...]:
    return next(row for row in table(read_runs(folder)) if row[0] == what)


FLOOR = "base, batch 8: over the floor"
WHAT = "base, batch 8, over the floor"


def test_without_a_run_every_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TARGETS) + 2
    assert all("no measurement" in row for row in lines[2:])


def test_met_and_short_by_how_much(tmp_path: Path) -> None:
    keep(tmp_path, "gpu", "NVIDIA H200", "2026-01-02T00:00", {FLOOR: 1.08, "base, batch 1: over the floor": 1.21})
    assert line(tmp_path, WHAT) == (WHAT, "1.08 x", "<= 1.1 x", "met", "NVIDIA H200", "abc1234", "2026-01-02")
    assert line(tmp_path, "base, batch 1, over the floor")[3] == "short by 10.0%"


def test_the_card_goes_before_the_date_and_the_newest_before_the_rest(tmp_path: Path) -> None:
    keep(tmp_path, "old", "NVIDIA H200", "2026-01-02T00:00", {FLOOR: 1.01})
    keep(tmp_path, "new", "NVIDIA H200", "2026-01-03T00:00", {FLOOR: 1.02})
    keep(tmp_path, "other", "NVIDIA H100", "2026-01-04T00:00", {FLOOR: 1.03})
    keep(tmp_path, "gpu-tiny", "NVIDIA H200", "2026-01-05T00:00", {FLOOR: 1.05})
    keep(tmp_path, "cpu", None, "2026-01-05T00:00", {FLOOR: 1.04})
    assert line(tmp_path, WHAT)[1] == "1.02 x"
    (tmp_path / "new.json").unlink()
    (tmp_path / "old.json").unlink()
    assert line(tmp_path, WHAT)[1] == "1.03 x"
    (tmp_path / "other.json").unlink()
    assert line(tmp_path, WHAT)[3] == "no measurement"


def test_what_else_is_kept_beside_is_passed_over(tmp_path: Path) -> None:
    """Figures of tests and of the simulator have another form."""
    keep(tmp_path, "gpu", "NVIDIA H200", "2026-01-02T00:00", {FLOOR: 1.08})
    (tmp_path / "simulator.json").write_text(json.dumps({"requests": 1, "rows": [{"hits": 1}]}))
    (tmp_path / "tests.json").write_text(json.dumps({"exit": 0, "figures": [], "machine": {"accelerator": "x"}}))
    assert line(tmp_path, WHAT)[3] == "met"
    assert len(table(read_runs(Path(__file__).parents[2] / "benchmarks" / "results"))) == len(TARGETS) + 1


def test_a_quotient_is_of_one_run(tmp_path: Path) -> None:
    keep(tmp_path, "a", "NVIDIA H200", "2026-01-02T00:00", {"8 adapters r16, batch 8": 5.5})
    keep(tmp_path, "b", "NVIDIA H200", "2026-01-01T00:00", {"base, batch 8": 5.0})
    assert line(tmp_path, "8 adapters r16, batch 8, over base")[3] == "no measurement"
    both = {"8 adapters r16, batch 8": 5.5, "base, batch 8": 5.0}
    keep(tmp_path, "c", "NVIDIA H200", "2026-01-01T00:00", both)
    assert line(tmp_path, "8 adapters r16, batch 8, over base")[1:4] == ("1.1 x", "<= 1.07 x", "short by 2.8%")


def test_a_ratio_measured_in_turns_goes_before_a_quotient(tmp_path: Path) -> None:
    case, what = "8 adapters r16, batch 8", "8 adapters r16, batch 8, over base"
    told = {case: 5.5, "base, batch 8": 5.0, "8 adapters r16, batch 8: over the base in turns": 1.06}
    keep(tmp_path, "turns", "NVIDIA H200", "2026-01-02T00:00", told)
    assert line(tmp_path, what)[1:4] == ("1.06 x", "<= 1.07 x", "met")
    keep(tmp_path, "newer", "NVIDIA H200", "2026-01-03T00:00", {case: 5.5, "base, batch 8": 5.0})
    assert line(tmp_path, what)[1:4] == ("1.1 x", "<= 1.07 x", "short by 2.8%")


def test_an_absolute_figure_of_another_card_is_not_judged() -> None:
    speed = Target("speed", "speed", ">=", 100.0, "tokens/s", absolute=True)
    assert verdict(speed, 50.0, "NVIDIA H100") == "the target is for the H200"
    assert verdict(speed, 50.0, "NVIDIA H200") == "short by 50.0%"
    assert verdict(speed, 150.0, "NVIDIA H200") == "met"


def test_the_rows_are_those_that_the_full_benchmarks_add() -> None:
    """Names are put together from the same numbers there; what would be renamed in silence is caught here."""
    rows = {target.row for target in TARGETS}
    assert {f"base, batch {batch}: over the floor" for batch in STEPS.batches} <= rows
    assert {f"{n} adapters r{rank}, batch {batch}" for batch, n, rank in STEPS.lora if (batch, n) != (32, 1)} <= rows
    few, many = COMPARE.slots
    assert f"{COMPARE.adapters} adapters r{COMPARE.rank}, batch {COMPARE.batch}: {many} slots over {few} slots" in rows
    assert {f"base, batch {batch}: LoRA on, idle over LoRA off" for batch in COMPARE.idle_batches} <= rows
    counts = FULL.trace.counts
    assert f"S-LoRA's trace, n = {max(counts)} over n = {min(counts)}" in rows
    offline, slots = FULL.offline, FULL.engine.max_loras_per_batch
    at_once = f"{offline.requests} requests ({offline.prompt} in, {offline.output} out) at once"
    assert f"{at_once}, {offline.many} adapters r{offline.rank} Zipf 1.0, {slots} slots" in rows
    capped = FULL.capped
    assert f"{capped.adapters} adapters r{capped.rank} {capped.modules}, Zipf 1.0, capped arena: loads" in rows
    arrivals, share = FULL.online.runs[0][0], FULL.online.share
    assert f"online, {arrivals}, {share:.0%} load: median gap over the pure decode step of its batch" in rows

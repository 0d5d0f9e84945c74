"""The simulator's short form: what must hold between its rows, whatever the figures."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.simulator import TRAFFICS, Case, Outcome, Simulation, cases, main, simulated

REQUESTS = 250


def outcome(eviction: str, traffic: int = 1, *, prefetch: bool = True, seed: int = 0) -> Outcome:
    return Case(TRAFFICS[traffic], eviction, prefetch).run(REQUESTS, seed=seed)


@pytest.mark.parametrize("traffic", range(len(TRAFFICS)), ids=[traffic.name for traffic in TRAFFICS])
def test_nobody_is_better_than_who_knows_what_comes(traffic: int) -> None:
    lru, clock, belady = (outcome(eviction, traffic) for eviction in ("lru", "clock", "belady"))
    assert belady.hit_rate > clock.hit_rate > lru.hit_rate > 0
    assert belady.loads < clock.loads < lru.loads


def test_more_skew_more_hits() -> None:
    rates = [outcome("clock", traffic).hit_rate for traffic in range(3)]
    assert rates == sorted(rates)


def test_prefetch_shortens_waits_where_slots_are_short() -> None:
    for seed in range(3):
        assert outcome("clock", 0, seed=seed).mean_wait < outcome("clock", 0, prefetch=False, seed=seed).mean_wait


def test_a_run_repeats_itself_and_serves_everything() -> None:
    assert outcome("clock") == outcome("clock")
    simulation = Simulation(simulated(True, True, None), TRAFFICS[4], requests=REQUESTS)
    simulation.run()
    simulation.scheduler.check()
    assert simulation.scheduler.idle
    assert simulation.scheduler.counters.counters["finished_length"] == REQUESTS


def test_the_table_has_every_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulator", "--requests", "20", "--json", str(tmp_path / "table.json")])
    main()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert len(rows) == len(cases()) == 5 * 3 * 2
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2

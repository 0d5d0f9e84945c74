"""Each benchmark's short form on the CPU, whole: a tiny model, every row that the full form has."""

import json
from pathlib import Path

import pytest

from benchmarks import floors, gateway, gpu, host_steps, online
from benchmarks.whole import SMALL

Rows = dict[str, float]


def rows(folder: Path, name: str) -> Rows:
    kept = json.loads((folder / f"{name}-tiny.json").read_text())
    assert kept["commit"] == "abc"
    assert kept["versions"]["torch"]
    return {row["name"]: row["median"] for row in kept["rows"]}


def run(folder: Path, *parts: str) -> None:
    assert gpu.main(["--tiny", "--commit", "abc", "--folder", str(folder), *parts]) == 0


def some(found: Rows, *words: str) -> float:
    """The one row that has all these words in its name."""
    values = [value for name, value in found.items() if all(word in name for word in words)]
    assert len(values) == 1, (words, list(found))
    return values[0]


def test_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["floors", "--tiny", "--commit", "abc", "--folder", str(tmp_path)])
    floors.main()
    found = rows(tmp_path, "floors")
    assert len([name for name in found if "products and head" in name]) == len(floors.BATCHES)
    assert found["floor: a decode step of batch 32, context 592"] > found["floor: products and head, batch 32"]
    assert all(value > 0 for value in found.values())


def test_steps(tmp_path: Path) -> None:
    run(tmp_path, "decode", "prefill", "lora", "load")
    found = rows(tmp_path, "gpu")
    assert found["base, batch 2: over the floor"] > 1
    assert some(found, "prefill", "base", "32 a step") > 0
    assert some(found, "prefill", "2 adapters r8", "32 a step") > 0
    assert found["adapter r8, host to arena: over the copy"] > 0
    assert found["2 adapters r16, batch 2"] > 0
    assert found["2 adapters r16, batch 2: over the base in turns"] > 0


def test_steps_of_the_host(tmp_path: Path) -> None:
    host_steps.main(["--tiny", "--commit", "abc", "--folder", str(tmp_path)])
    found = rows(tmp_path, "host-steps")
    parts = [f"{part} a step, {count} adapters" for count in (2, 5) for part in ("planning", "packing", "committing")]
    assert all(found[part] > 0 for part in parts)


def test_gateway_alone(tmp_path: Path) -> None:
    assert gateway.main(["--tiny", "--commit", "abc", "--folder", str(tmp_path)]) == 0
    found = rows(tmp_path, "gateway")
    assert found["2 streams: answers"] > 0
    assert 0 < found["2 streams: of a core"] < 2
    assert found["2 streams: gap, largest"] >= found["2 streams: gap, median"] > 0


def test_step_against_step(tmp_path: Path) -> None:
    run(tmp_path, "idle", "slots")
    found = rows(tmp_path, "compare")
    assert found["base, batch 1: LoRA on, idle over LoRA off"] > 0
    assert found["2 adapters r8, batch 2: 4 slots over 2 slots"] > 0


def test_offline_and_cold_starts(tmp_path: Path) -> None:
    run(tmp_path, "offline", "cold")
    found = rows(tmp_path, "whole")
    assert some(found, "at once, base") > 0
    assert some(found, "at once, 2 adapters r8") > 0
    assert some(found, "Zipf 1.0, 4 slots") > 0
    assert found["cold start: adapters copied from the host meanwhile"] == SMALL.cold.loads
    assert found["cold start: first token, adapter on disk"] > 0
    assert "cold start: 99th percentile of the streams' gaps, host loads less none" in found


def test_online_over_http(tmp_path: Path) -> None:
    arguments = ["--tiny", "--commit", "abc", "--folder", str(tmp_path)]
    assert online.main(arguments) == 0
    found = rows(tmp_path, "online")
    assert some(found, "Poisson", "time to first token, median") > 0
    assert some(found, "Poisson", "inter-token latency, 99th percentile") > 0
    assert some(found, "Poisson", "over the pure decode step") > 0


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--tiny", "stpes"])
    assert "no such part: stpes" in capsys.readouterr().err

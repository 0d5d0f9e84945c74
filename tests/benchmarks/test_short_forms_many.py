"""The short forms of the benchmarks of many adapters, each with engines of its own."""

from pathlib import Path

from tests.benchmarks.test_short_forms import rows, run, some


def test_traces_of_many_adapters(tmp_path: Path) -> None:
    run(tmp_path, "trace")
    found = rows(tmp_path, "trace")
    assert found["S-LoRA's trace, n = 2: complete requests"] > 0
    assert found["S-LoRA's trace, n = 4 over n = 2"] > 0


def test_a_capped_arena_evicts(tmp_path: Path) -> None:
    run(tmp_path, "capped")
    found = rows(tmp_path, "capped")
    assert some(found, "uncapped arena: evictions") == 0
    assert some(found, " capped arena: evictions") > 0
    assert some(found, " capped arena: loads") > 0
    assert found["arena capped over uncapped, throughput"] > 0

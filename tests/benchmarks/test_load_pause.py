"""The mechanics of the measurement of loads: made adapters that a server takes, gaps by span, bounds that can fail."""

from pathlib import Path

import pytest
import torch

from benchmarks.load_pause import Gaps, Measured, Phase, Spans, make_adapter, tell
from benchmarks.report import Report
from engine.adapters.peft import read_adapter
from engine.adapters.spec import AdapterLimits
from engine.models.dims import LORA_MODULES, ModelDims

DIMS = ModelDims(2, 64, 96, 4, 2, 16, 256)


def test_a_made_adapter_is_a_good_one(tmp_path: Path) -> None:
    file = read_adapter(make_adapter(tmp_path / "made", DIMS, 16, seed=1), DIMS, AdapterLimits(16))
    assert (file.spec.rank, file.spec.module_names) == (16, LORA_MODULES)
    other = read_adapter(make_adapter(tmp_path / "other", DIMS, 16, seed=2), DIMS, AdapterLimits(16))
    assert not torch.equal(file.pairs[0, 0].a, other.pairs[0, 0].a)


def test_gaps_belong_to_the_span_in_which_they_lie() -> None:
    gaps = Gaps([[0.0, 1.0, 1.5, 3.0], [0.5, 2.5]])
    assert gaps.between(0.0, 1.5) == [0.5, 1.0]
    assert gaps.between(1.0, 3.0) == [0.5, 1.5]


def test_a_phase_names_median_tail_and_largest() -> None:
    phase = Phase.of([0.01] * 98 + [0.02, 0.05])
    assert (phase.median, phase.p99, phase.largest, phase.count) == pytest.approx((10, 20, 50, 100))
    assert (phase.above, Phase.of([0.01] * 3, 4.0).above) == (1, 3)


def test_tokens_of_one_event_came_at_even_distances() -> None:
    gaps, times = Gaps(), list[float]()
    for now, total in ((1.0, 1), (2.0, 2), (5.0, 5), (6.0, 6)):
        gaps.event(times, now, total)
    assert times == pytest.approx([1, 2, 3, 4, 5, 6])
    assert gaps.shared == 1


@pytest.mark.parametrize(("gap", "kept"), [(0.01, True), (0.03, False)])
def test_the_bounds_tell_loads_that_disturb(gap: float, kept: bool) -> None:
    calm = [i * 0.01 for i in range(101)]
    loud = [1.0 + i * gap for i in range(101)]
    after = [loud[-1] + i * 0.01 for i in range(101)]
    spans = Spans((0.0, 1.0), (1.0, loud[-1] + 1e-9), (loud[-1] - 1e-9, after[-1] + 1))
    report = Report("test", commit="none")
    assert tell(report, Measured(Gaps([calm, loud, after]), [spans, spans]), count=5) is kept
    assert len(report.rows) == 12
    assert all(len(row.values) == 2 for row in report.rows)

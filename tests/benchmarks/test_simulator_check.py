"""The short form of the simulator's check against the real engine."""

import pytest

from benchmarks.simulator_check import SMALL, run_engine, run_simulator


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["overlap", "no overlap"])
async def test_the_simulator_tells_what_the_engine_does(overlap: bool) -> None:
    measured = await run_engine(SMALL, 0, overlap=overlap)
    engine, simulator = measured.told, run_simulator(measured, SMALL, 0)
    assert 0.2 < engine.hit_rate < 0.8
    assert simulator.hit_rate == pytest.approx(engine.hit_rate, rel=0.05)
    assert simulator.mean_wait == pytest.approx(engine.mean_wait, rel=0.1)
    assert simulator.prefix_rate == pytest.approx(engine.prefix_rate, rel=0.05)
    assert min(engine.copies, engine.demotions) > 0
    assert simulator.copies == pytest.approx(engine.copies, rel=0.05)
    assert simulator.demotions == pytest.approx(engine.demotions, rel=0.05)

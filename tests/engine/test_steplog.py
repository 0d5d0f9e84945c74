"""The steps' log line: at most one every ten seconds, with rates over that time, and none while idle."""

import logging

import pytest

from engine.messages import AdapterStats, Stats
from engine.steplog import StepLog

CHUNKS = {"free": 50, "kv": 25, "prefix": 0, "adapter": 25}


def stats(step: int, tokens: int) -> Stats:
    base = AdapterStats(name="", tier="arena", pinned=True, rank=0, generated_tokens=tokens)
    return Stats(step=step, running=3, waiting=1, slots_total=8, slots_used=2, chunks=CHUNKS, adapters=[base])


def test_a_line_tells_rates_since_the_last_and_idle_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = StepLog(0.0)
    lines.observe(stats(10, 40), 1.0)
    assert not caplog.messages
    lines.observe(stats(100, 400), 10.0)
    assert caplog.messages == [
        "3 running, 1 waiting, 10.0 steps/s, 40.0 tokens/s, 2 of 8 slots, arena: kv 25 %, prefix 0 %, adapter 25 %"
    ]
    lines.observe(stats(100, 400), 20.0)
    assert len(caplog.messages) == 1
    lines.observe(stats(150, 500), 30.0)
    assert "5.0 steps/s, 10.0 tokens/s" in caplog.messages[1]

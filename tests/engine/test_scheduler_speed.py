"""What planning costs: the best of several steps, with a wide margin over what was measured (0.9 ms and 0.6 ms)."""

import time

from engine.messages import Submit
from engine.plan import SequenceResult, StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.types import SamplingParams


def result(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, [SequenceResult([5] if row.sample else []) for row in plan.sequences], 0.0)


def steady(num_chunks: int) -> tuple[float, float]:
    """Seconds of the fastest plan and commit with 256 sequences decoding, one step ahead."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_chunks=num_chunks, block_tokens=16, chunk_bytes=256, max_model_len=2048, prefill_tokens=8192
        )
    )
    params = SamplingParams(max_tokens=500, seed=0, ignore_eos=True)
    for request_id in range(256):
        scheduler.submit(Submit(request_id=request_id, prompt=[request_id] * 400, params=params), 0.0)
    flights: list[StepPlan] = []
    plans, commits = [], []
    for _ in range(120):
        start = time.perf_counter()
        plan = scheduler.plan(0.0)
        plans.append(time.perf_counter() - start)
        assert plan is not None
        flights.append(plan)
        if len(flights) == 2:
            due = result(flights.pop(0))
            start = time.perf_counter()
            scheduler.commit(due, 0.0)
            commits.append(time.perf_counter() - start)
    assert len(flights[-1].sequences) == 256
    return min(plans[-60:]), min(commits[-60:])


def test_a_steady_step_is_planned_in_a_few_milliseconds() -> None:
    plan, commit = steady(16_000)
    assert plan < 0.008
    assert commit < 0.008


def test_a_plan_costs_the_same_in_a_larger_arena() -> None:
    assert steady(160_000)[0] < 3 * steady(16_000)[0] + 0.001

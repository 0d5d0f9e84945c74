"""One run at the largest step before anything is served: its time tells what would be a hung step."""

import time
from collections.abc import Callable

from engine.geometry import Geometry
from engine.plan import Admission, SequenceStep, StepPlan
from engine.types import SamplingParams


def largest_step(step_tokens: int, context_length: int, num_chunks: int, geometry: Geometry) -> StepPlan:
    """A plan with as many tokens as a step may hold, of one sequence, in the arena's first chunks."""
    length = min(step_tokens, context_length, num_chunks * geometry.block_tokens)
    tokens, blocks = (0,) * length, tuple(range(geometry.blocks(length)))
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    admission = Admission(row=0, sequence_id=-1, tokens=tokens, prompt_length=length, choice=0, params=params)
    step = SequenceStep(
        row=0,
        sequence_id=-1,
        slot=-1,
        start=0,
        length=length,
        tokens=tokens,
        first_new_block=0,
        new_blocks=blocks,
        sample=True,
        output_index=0,
        ban_stops=False,
    )
    return StepPlan(step=0, slots=(), admissions=(admission,), sequences=(step,))


def timed(run: Callable[[], object]) -> float:
    """Seconds that the call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started

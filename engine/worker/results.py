"""What a step gave one sequence, put together alike by the runners of every device."""

from collections.abc import Mapping

from engine.plan import SequenceResult, SequenceStep
from engine.types import TokenLogprob


def sequence_result(
    step: SequenceStep,
    ids: Mapping[int, int],
    logprobs: Mapping[int, TokenLogprob],
    prompts: Mapping[int, list[TokenLogprob]],
) -> SequenceResult:
    """`ids`, `logprobs` and `prompts` are by state row."""
    return SequenceResult(
        tokens=[ids[step.row]] if step.sample else [],
        logprobs=[logprobs[step.row]] if step.sample and step.row in logprobs else None,
        prompt_logprobs=prompts.get(step.row),
    )

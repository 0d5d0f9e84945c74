"""Sampling as plain as can be, one row at a time in float64: which token the reference's logits must become."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.types import SamplingParams
from engine.worker.noise import uniform
from tests.parity.judge import Ask
from tests.parity.reference import Reference
from tests.support.engine import Answer
from tests.support.models import EOS_TOKEN

NEAR = 2e-4  # of a probability: closer than this to a border either side may win
Row = NDArray[np.float64]


def faults(reference: Reference, ask: Ask, choices: Sequence[Answer]) -> tuple[list[str], int, int]:
    """(what is wrong with the choices' tokens, positions too near a border to tell, positions)."""
    wrong, near, positions = list[str](), 0, 0
    for choice, answer in enumerate(choices):
        logits = reference.logits(ask.prompt + answer.tokens, ask.adapter).double().numpy()[len(ask.prompt) - 1 :]
        for index, token in enumerate(answer.tokens):
            positions += 1
            edited = edit(logits[index], ask.prompt, answer.tokens[:index], ask.params)
            likely, allowed = candidates(edited, ask.params, uniform(ask.params.seed, choice, index))
            if token != likely and token in allowed:
                near += 1
            elif token != likely:
                wrong.append(f"{ask.adapter or 'base'} {ask.params}: token {index} of choice {choice}")
    return wrong, near, positions


def edit(logits: Row, prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> Row:
    """Penalties, bias, and what may not be sampled yet."""
    row = logits.copy()
    for token in {*prompt, *output}:
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token in set(output):
        row[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        row[token] += bias
    if len(output) < params.min_tokens:
        row[[EOS_TOKEN, *params.stop_token_ids]] = -np.inf
    return row


def candidates(row: Row, params: SamplingParams, noise: float) -> tuple[int, set[int]]:
    """(the token, those that it may be as well for a hair's breadth)."""
    if params.temperature == 0:
        return int(row.argmax()), {int(token) for token in np.flatnonzero(row > row.max() - 1e-3)}
    probs = np.exp((row - row.max()) / params.temperature)
    probs /= probs.sum()
    kept = [keep(probs, params, change) for change in (0.0, -NEAR, NEAR)]
    draws = [draw(probs * k, noise + change) for k in kept for change in (0.0, -NEAR, NEAR)]
    return draws[0], set(draws)


def keep(probs: Row, params: SamplingParams, change: float) -> NDArray[np.bool_]:
    """Top-k, then top-p of what that leaves, then min-p."""
    order = np.sort(probs)[::-1]
    count = params.top_k or len(order)
    least = order[min(count, len(order)) - 1]
    if params.top_p < 1:
        head = order[:count].cumsum()
        least = max(least, order[min(int((head < (params.top_p + change) * head[-1]).sum()), len(head) - 1)])
    least = max(least, params.min_p * order[0] * (1 + change))
    kept: NDArray[np.bool_] = probs >= least * (1 - 1e-9)
    return kept


def draw(weights: Row, noise: float) -> int:
    """The token in whose share of the sum the noise falls, in the order of ids."""
    cumulated = weights.cumsum()
    place = int(np.searchsorted(cumulated, min(max(noise, 0.0), 1 - 1e-12) * cumulated[-1], side="right"))
    return min(place, len(weights) - 1)

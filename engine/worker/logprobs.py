"""Log-probabilities for the answer: the model's own, in float32, with rank and the most likely alternatives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.types import TokenLogprob


def token_logprobs(logits: Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """[rows, vocab] float32, a token and a number of alternatives for each row."""
    if not len(tokens):
        return []
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    tops = _tops(logprobs, alternatives)
    values = chosen[:, 0].tolist()
    return [TokenLogprob(*row) for row in zip(tokens, values, ranks, tops, strict=True)]


def _tops(logprobs: Tensor, alternatives: Sequence[int]) -> list[list[tuple[int, float]]]:
    most = min(max(alternatives), logprobs.shape[-1])
    if most == 0:
        return [[] for _ in alternatives]
    values, ids = (x.tolist() for x in logprobs.topk(most, -1))
    return [list(zip(i, v, strict=True))[:n] for i, v, n in zip(ids, values, alternatives, strict=True)]

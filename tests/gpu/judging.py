"""Teacher forcing against transformers: our argmax and log-probabilities given the reference's own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.engine.worker.harness import Request
from tests.gpu.reference import DeviceReference

MARGIN = 0.1  # of the float32 logits; below it bf16 may choose otherwise
SHARE = 1.2  # of the error that transformers makes in the same dtype


@dataclass(frozen=True)
class Judgement:
    tokens: int
    outputs: int  # of them, those whose argmax was looked at
    near: int  # positions whose margin is below MARGIN
    wrong: int  # positions with another argmax, the near ones left out
    peer_wrong: int  # the same of transformers' in our dtype
    widest: float  # the largest margin at which our argmax was another
    error: float  # mean absolute error of our log-probabilities
    peer_error: float  # of transformers' in our dtype


def judge(requests: Sequence[Request], exact: DeviceReference, peer: DeviceReference, prefix: bool = True) -> Judgement:
    """The requests must have run with logprobs=1; every output token and (with prompt_logprobs) prompt token counts."""
    ours, peers = [0.0], [0.0]
    margins: list[float] = []
    missed: tuple[list[float], list[float]] = [], []  # margins where our argmax, and the peer's, was another
    for request in requests:
        tokens = [*request.prompt, *request.tokens]
        wanted, other = (m.logits(tokens[:-1], request.adapter_id).log_softmax(-1).cpu() for m in (exact, peer))
        first = len(request.prompt) - 1
        best = wanted.topk(2, -1)
        for position, (token, told) in enumerate(zip(request.tokens, request.logprobs, strict=True), first):
            margins.append(float(best.values[position, 0] - best.values[position, 1]))
            chosen = told.top[0][0], int(other[position].argmax())
            for found, one in zip(missed, chosen, strict=True):
                found += [margins[-1]] if one != int(best.indices[position, 0]) else []
            ours.append(abs(told.logprob - float(wanted[position, token])))
            peers.append(abs(float(other[position, token] - wanted[position, token])))
        for position, told in enumerate(request.prompt_logprobs if prefix else ()):
            ours.append(abs(told.logprob - float(wanted[position, told.token])))
            peers.append(abs(float(other[position, told.token] - wanted[position, told.token])))
    count = len(ours) - 1
    wrong, peer_wrong = (sum(margin > MARGIN for margin in some) for some in missed)
    near = sum(margin <= MARGIN for margin in margins)
    return Judgement(
        count, len(margins), near, wrong, peer_wrong, max(missed[0], default=0.0), sum(ours) / count, sum(peers) / count
    )


def assert_right(judgement: Judgement) -> None:
    assert judgement.wrong == 0, judgement
    assert judgement.error <= SHARE * judgement.peer_error, judgement

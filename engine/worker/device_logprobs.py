"""Log-probabilities on the device without waiting for it: small tensors that are read when the step is collected."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.types import TokenLogprob
from engine.worker.accelerator import Accelerator


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """On their way to the host; valid once the step's event has happened."""

    tokens: Tensor  # [rows] int64
    values: Tensor  # [rows] float32
    ranks: Tensor  # [rows] int64
    top_values: Tensor  # [rows, most] float32
    top_tokens: Tensor  # [rows, most] int64
    alternatives: tuple[int, ...]

    def read(self) -> list[TokenLogprob]:
        columns = (self.tokens, self.values, self.ranks, self.top_tokens, self.top_values)
        tokens, values, ranks, ids, tops = (column.tolist() for column in columns)
        return [
            TokenLogprob(token, value, rank, list(zip(i, v, strict=True))[:count])
            for token, value, rank, i, v, count in zip(tokens, values, ranks, ids, tops, self.alternatives, strict=True)
        ]


def logprob_rows(logits: Tensor, tokens: Tensor, alternatives: Sequence[int], accelerator: Accelerator) -> LogprobRows:
    """[rows, vocab] float32 of the model itself, [rows] int64, and how many of the likeliest each row tells."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, tokens[:, None])
    ranks = (logits > chosen).sum(-1) + 1
    most = min(max(alternatives, default=0), logits.shape[-1])
    top_values, top_tokens = logits.topk(most, -1)
    host = accelerator.download
    return LogprobRows(
        host(tokens),
        host((chosen - total)[:, 0]),
        host(ranks),
        host(top_values - total),
        host(top_tokens),
        tuple(alternatives),
    )

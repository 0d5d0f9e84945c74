"""One token for each row of logits: temperature, top-k, top-p, min-p, then the inverse of the cumulated probabilities.

A row's token depends on that row alone. Filters keep every token whose probability reaches the threshold they find, so
that tokens of equal probability share their fate and no order among them matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.worker.search import inverse_cdf

HEAD = 128  # the most likely tokens looked at first; then eight times as many, again and again
SLAB = 8  # rows drawn at once, so that they stay in the cache


@dataclass(frozen=True, slots=True)
class DrawParams:
    """One value for each row."""

    temperature: Tensor  # [rows] float32, above 0
    top_k: Tensor  # [rows] int64; 0: off
    top_p: Tensor  # [rows] float32; 1: off
    min_p: Tensor  # [rows] float32; 0: off
    uniform: Tensor  # [rows] float64 in [0, 1)

    def rows(self, index: slice | Tensor) -> "DrawParams":
        return DrawParams(
            self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index], self.uniform[index]
        )


def draw(logits: Tensor, params: DrawParams) -> Tensor:
    """[rows, vocab] float32 -> [rows] int64."""
    slabs = range(0, logits.shape[0], SLAB)
    return torch.cat([_draw(logits[i : i + SLAB], params.rows(slice(i, i + SLAB))) for i in slabs])


def _draw(logits: Tensor, params: DrawParams) -> Tensor:
    shifted = logits - logits.amax(-1, keepdim=True)  # so that a small temperature cannot overflow
    probs = shifted.div_(params.temperature[:, None]).softmax(-1)
    least = threshold(probs, params)
    if (least > 0).any():
        probs.masked_fill_(probs < least[:, None], 0.0)
    return inverse_cdf(probs, params.uniform)


def threshold(probs: Tensor, params: DrawParams) -> Tensor:
    """[rows] float32: the least probability that the filters keep."""
    least = params.min_p * probs.amax(-1)
    filtered = ((params.top_k > 0) | (params.top_p < 1.0)).nonzero()[:, 0]
    if len(filtered):
        kept = _ranked_threshold(_rows(probs, filtered), params.top_k[filtered], params.top_p[filtered])
        least[filtered] = torch.maximum(least[filtered], kept)
    return least


def _ranked_threshold(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The filters that need an order, over the head of each row, a longer one where that is too short."""
    vocab = probs.shape[-1]
    least, rest = probs.new_empty(probs.shape[0]), torch.arange(probs.shape[0], device=probs.device)
    for width in (HEAD, 8 * HEAD, 64 * HEAD, vocab):
        some = _rows(probs, rest)
        ordered = some.topk(width, -1).values if width < vocab else some.sort(-1, descending=True).values
        least[rest], enough = _from_sorted(ordered, some, top_k[rest], top_p[rest])
        rest = rest[~enough]
        if width >= vocab or not len(rest):
            break
    return least


def _from_sorted(ordered: Tensor, probs: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """([rows] thresholds, [rows] bool: the ordered head was long enough). Top-p is a share of what top-k leaves."""
    width = ordered.shape[-1]
    count = torch.where(top_k > 0, top_k, probs.shape[-1])
    inside = torch.arange(width, device=probs.device) < count[:, None]
    head = ordered.double().masked_fill(~inside, 0.0).cumsum(-1)
    total = torch.where(count <= width, head[:, -1], 1.0)  # probabilities add up to 1
    needed = (head < (top_p * total)[:, None]).sum(-1)  # places before the one that reaches the share
    last = torch.minimum(torch.where(top_p < 1.0, needed, probs.shape[-1]), count - 1)
    enough = (last < width) & ((count <= width) | (top_k == 0))  # else what top-k leaves is not known
    return ordered.gather(-1, last.clamp(max=width - 1)[:, None])[:, 0], enough


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Those rows, without a copy where they are all."""
    return values if len(index) == len(values) else values[index]

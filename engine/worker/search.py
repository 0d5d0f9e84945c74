"""Places found in long rows in two stages: first which part of the row, then where within it. Rows are independent."""

import math

import torch
from torch import Tensor

PART = 1024  # at most so many values of a row are looked at together
LEAST_PART = 64  # rows that divide only into smaller parts are searched whole
BELOW_ONE = 1.0 - 2.0**-52


def argmax(rows: Tensor) -> Tensor:
    """[rows, width] -> [rows] int64, the first of equals. A maximum is found several times faster than its place."""
    part = part_of(rows.shape[-1])
    parts = rows.view(rows.shape[0], -1, part)
    best = parts.amax(-1).argmax(-1)
    return _take(parts, best).argmax(-1) + best * part


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place at which the cumulated weights exceed their total times `uniform`; its weight is never zero.

    weights: [rows, width] float32, none negative; uniform: [rows] float64 in [0, 1). Returns [rows] int64; some place
    where a row is all NaN.
    """
    part = part_of(weights.shape[-1])
    parts = weights.view(weights.shape[0], -1, part)
    ends = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * ends[:, -1:]
    which = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    before = torch.where(which > 0, ends.gather(-1, (which - 1).clamp_(min=0)), 0.0)
    within = _take(parts, which[:, 0]).double().cumsum(-1)
    place = torch.searchsorted(within, torch.minimum(target - before, within[:, -1:] * BELOW_ONE), right=True)
    return (which * part + place.clamp_(max=part - 1))[:, 0]


def part_of(width: int) -> int:
    """The largest power of two up to PART that divides the width, or the width itself."""
    part = math.gcd(width, PART)
    return part if part >= LEAST_PART else width


def _take(parts: Tensor, which: Tensor) -> Tensor:
    """[rows, parts, part], [rows] -> [rows, part]."""
    return parts[torch.arange(parts.shape[0], device=parts.device), which]

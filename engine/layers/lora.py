"""The ways a batch's adapters reach a base product, on plain torch.

A site is one merged product of a decoder layer. A path is made once a step for the batch at hand; the decoder asks it
for every product. Tokens of the base get what the base alone gives: whatever is added to their rows is an exact zero.
Both paths with adapters add the same numbers in the same order, so that they agree to the bit where the products do
(bfloat16 on the CPU): an adapter's ranks are one reduction, and those of others add exact zeros to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.layers.linear import Product

QKV, OUT, GATE_UP, DOWN = range(4)
SITE_MODULES = ((0, 1, 2), (3,), (4, 5), (6,))  # positions in LORA_MODULES that each site merges


@dataclass(frozen=True, slots=True)
class SitePair:
    """The A of all adapters and modules at one site of one layer stacked by rank, their B block-diagonal."""

    a: Product  # [ranks, in]
    b: Product  # [out, ranks], scaled by alpha
    owner: Tensor  # [ranks] int64: which adapter of the set a column belongs to
    widths: tuple[int, ...]  # ranks of each adapter of the set; says which pairs may share a mask


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """One or several adapters, merged for the torch backend. A copy: it stays valid when their chunks are reused."""

    adapter_ids: tuple[int, ...]
    pairs: tuple[tuple[SitePair | None, ...], ...]  # [layer][site]; None where no adapter of the set has a module
    elements: int  # weights in all, zeros among them: what a token is multiplied with


class LoraPath(Protocol):
    """How the products of one step are computed."""

    def product(self, layer: int, site: int, base: Product, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """base(x) + each token's own adapter's delta + addend; [tokens, in] -> [tokens, out]."""
        ...


class BaseOnly:
    """No token of the batch has an adapter: nothing is done for LoRA."""

    def product(self, layer: int, site: int, base: Product, x: Tensor, addend: Tensor | None = None) -> Tensor:
        return base(x, addend)


class StackedLora:
    """Every token through every rank of the set, what is not its own masked away: two products whatever the batch."""

    def __init__(self, stack: AdapterSet, owners: Tensor) -> None:
        self._stack = stack
        self._owners = owners[:, None]  # [tokens, 1] int64: position in the set, -1 for the base
        self._foreign: dict[tuple[int, ...], Tensor] = {}  # widths -> [tokens, ranks] bool

    def product(self, layer: int, site: int, base: Product, x: Tensor, addend: Tensor | None = None) -> Tensor:
        pair = self._stack.pairs[layer][site]
        if pair is None:
            return base(x, addend)
        z = pair.a(x).masked_fill_(self._mask(pair), 0.0)  # a selection: another adapter's infinity goes too
        return base(x, pair.b(z, addend))

    def _mask(self, pair: SitePair) -> Tensor:
        mask = self._foreign.get(pair.widths)
        if mask is None:
            mask = self._foreign[pair.widths] = self._owners != pair.owner
        return mask


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens of one adapter."""

    start: int
    end: int
    adapter: AdapterSet  # of one


class SegmentedLora:
    """Adapter by adapter, each over its own tokens only; the batch is sorted by slot."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def product(self, layer: int, site: int, base: Product, x: Tensor, addend: Tensor | None = None) -> Tensor:
        total: Tensor | None = None
        for segment in self._segments:
            pair = segment.adapter.pairs[layer][site]
            if pair is None:
                continue
            if total is None:
                total = x.new_zeros(x.shape[0], base.out_features) if addend is None else addend.clone()
            rows = slice(segment.start, segment.end)
            total[rows] = pair.b(pair.a(x[rows]), None if addend is None else addend[rows])
        return base(x, addend if total is None else total)


def owner_of_tokens(ids: Sequence[int | None], lengths: Sequence[int], stack: AdapterSet) -> Tensor:
    """[tokens] int64: for each token the position of its adapter in the set, -1 for the base."""
    place = {adapter: index for index, adapter in enumerate(stack.adapter_ids)}
    owners = torch.tensor([-1 if i is None else place[i] for i in ids], dtype=torch.int64)
    return owners.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))

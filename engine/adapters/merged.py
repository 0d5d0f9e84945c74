"""Adapters in the form the torch backend multiplies with: pieces of a site brought together, then packed.

Built off the step's path, when an adapter becomes resident or the set in use changes.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine.layers.linear import REDUCTION_BLOCK, make_product
from engine.layers.lora import SITE_MODULES, AdapterSet, SitePair
from engine.layers.packing import reorder
from engine.models.dims import LORA_MODULES, ModelDims

# (layer, module) -> blocks of (A [ranks, in], B [out, ranks]), in the order of their ranks; views into the arena
PieceViews = Mapping[tuple[int, int], Sequence[tuple[Tensor, Tensor]]]

Pack = Callable[[Tensor], Tensor]
NOBODY = -2  # owner of columns that only fill up a block; no token's


def merge(dims: ModelDims, adapters: Mapping[int, PieceViews], pack: Pack = reorder) -> AdapterSet:
    """Merges the adapters, in the mapping's order, into one set."""
    views, elements, layers = list(adapters.values()), 0, []
    for layer in range(dims.layers):
        row: list[SitePair | None] = []
        for modules in SITE_MODULES:
            pair, size = _merge_site(dims, views, layer, modules, pack)
            row.append(pair)
            elements += size
        layers.append(tuple(row))
    return AdapterSet(tuple(adapters), tuple(layers), elements)


def _merge_site(
    dims: ModelDims, adapters: Sequence[PieceViews], layer: int, modules: tuple[int, ...], pack: Pack
) -> tuple[SitePair | None, int]:
    """The pair of one site and its number of weights."""
    blocks = [
        (owner, offset, a, b)
        for owner, views in enumerate(adapters)
        for module, offset in zip(modules, _offsets(dims, modules), strict=True)
        for a, b in views.get((layer, module), ())
    ]
    if not blocks:
        return None, 0
    widths = [0] * len(adapters)
    for owner, _, a, _ in blocks:
        widths[owner] += a.shape[0]
    columns, total = _columns(widths)
    like = blocks[0][2]
    a_all = like.new_zeros(total, like.shape[1])
    b_all = like.new_zeros(sum(_out(dims, module) for module in modules), total)
    owner_of = torch.full((total,), NOBODY, dtype=torch.int64, device=like.device)
    for owner, offset, a, b in blocks:
        ranks = slice(columns[owner], columns[owner] + a.shape[0])
        a_all[ranks], b_all[offset : offset + b.shape[0], ranks], owner_of[ranks] = a, b, owner
        columns[owner] = ranks.stop
    products = make_product(a_all, pack=pack), make_product(b_all, pack=pack)
    return SitePair(*products, owner_of, tuple(widths)), a_all.numel() + b_all.numel()


def _columns(widths: Sequence[int]) -> tuple[list[int], int]:
    """(where each adapter's ranks start, columns in all).

    An adapter that would cross the end of a reduction block starts at the next one, so that its ranks are added up as
    they are when it is alone.
    """
    starts, end = list[int](), 0
    for width in widths:
        if end % REDUCTION_BLOCK + width > REDUCTION_BLOCK:
            end = -(-end // REDUCTION_BLOCK) * REDUCTION_BLOCK
        starts.append(end)
        end += width
    return starts, end


def _out(dims: ModelDims, module: int) -> int:
    return dims.module_shape(LORA_MODULES[module])[1]


def _offsets(dims: ModelDims, modules: tuple[int, ...]) -> list[int]:
    """Where each module's outputs start in the merged product."""
    ends = [0]
    for module in modules:
        ends.append(ends[-1] + _out(dims, module))
    return ends[:-1]

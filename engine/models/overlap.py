"""What a step of few tokens overlaps: weights fetched ahead by the kernels before, launches that do not wait in line.

Nothing of it changes a result. Used by the device decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.device_weights import DecoderWeights
from kernels.fetch import Ahead, columns_ahead, rows_ahead

MIB = 1 << 20
MOST_TOKENS = 256  # of a step that overlaps; larger ones are bound by products


@dataclass(frozen=True, slots=True)
class Overlap:
    """Switches, for tests and for finding out what each is worth."""

    qkv: int = 8 * MIB  # bytes of the weight that are fetched while the kernel before the product runs
    o: int = 8 * MIB
    gate_up: int = 8 * MIB
    down: int = 8 * MIB
    columns: bool = False  # of every output feature the first inputs, else the first output features
    pdl: bool = True  # a kernel may start before the one ahead of it has ended
    pdl_joined: bool = True  # the same where the kernel ahead is two: the product and the delta
    expand_pdl: bool = True
    fetch_b: bool = True  # shrink fetches what expand reads
    expand_inside: bool = True  # in large steps SiLU-and-mul expands its delta itself
    norm_inside: bool = True  # and so does add-and-norm


OFF = Overlap(0, 0, 0, 0, False, False, False, False, False, False, False)


def supported(device: torch.device) -> bool:
    """Whether the device has bulk fetches and dependent launches."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@dataclass(frozen=True, slots=True)
class LayerAhead:
    """What is fetched before each product of a layer; `qkv` of the layer after it, or the head."""

    o: Ahead | None
    gate_up: Ahead | None
    down: Ahead | None
    qkv: Ahead | None


NOTHING = LayerAhead(None, None, None, None)


def plan_ahead(weights: DecoderWeights, overlap: Overlap) -> Sequence[LayerAhead]:
    """By layer."""

    def part(weight: Tensor, size: int) -> Ahead | None:
        if not size:
            return None
        return columns_ahead(weight, size) if overlap.columns else rows_ahead(weight, size)

    following = [*(layer.qkv.weight for layer in weights.layers[1:]), weights.head]
    return [
        LayerAhead(
            part(layer.o.weight, overlap.o),
            part(layer.gate_up.weight, overlap.gate_up),
            part(layer.down.weight, overlap.down),
            part(after, overlap.qkv),
        )
        for layer, after in zip(weights.layers, following, strict=True)
    ]

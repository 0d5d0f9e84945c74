"""What a step of few tokens overlaps: weights fetched ahead by the kernels before, launches that do not wait in line.

Nothing of it changes a result. Used by the device decoder; what each is worth is in docs/performance.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.device_weights import DecoderWeights
from kernels.ahead import Ahead, rows_ahead

MIB = 1 << 20
PDL_TOKENS = 256  # of a step whose launches overlap; larger ones are bound by products


@dataclass(frozen=True, slots=True)
class Overlap:
    """Switches, for tests and for finding out what each is worth."""

    fetch: int = 4 * MIB  # bytes of each weight that are fetched while the kernel before its product runs
    fetch_tokens: int = 16  # of the largest step that fetches: beyond, attention wants the memory and the cache itself
    pdl: bool = True  # a kernel may start before the one ahead of it has ended

    def fetches(self, tokens: int) -> bool:
        return self.fetch > 0 and tokens <= self.fetch_tokens

    def dependent(self, tokens: int) -> bool:
        return self.pdl and tokens <= PDL_TOKENS


OFF = Overlap(fetch=0, pdl=False)


def default_overlap(device: torch.device) -> Overlap:
    """Where the device has bulk fetches and dependent launches."""
    supported = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return Overlap() if supported else OFF


@dataclass(frozen=True, slots=True)
class LayerAhead:
    """What is fetched before each product of a layer; `qkv` of the layer after it, or the head."""

    o: Ahead | None
    gate_up: Ahead | None
    down: Ahead | None
    qkv: Ahead | None


NOTHING = LayerAhead(None, None, None, None)


def plan_ahead(weights: DecoderWeights, size: int) -> Sequence[LayerAhead]:
    """By layer: `size` bytes of each weight."""

    def part(weight: Tensor) -> Ahead | None:
        return rows_ahead(weight, size) if size else None

    following = [*(layer.qkv.weight for layer in weights.layers[1:]), weights.head]
    return [
        LayerAhead(part(layer.o.weight), part(layer.gate_up.weight), part(layer.down.weight), part(after))
        for layer, after in zip(weights.layers, following, strict=True)
    ]

"""What small steps do to keep memory busy (launches that do not wait in line, products that fetch their weights ahead)
and large ones to read less (products added onto LoRA's deltas).

Used by the device decoder; what each is worth is in docs/performance.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import PRODUCT_ROWS
from kernels.lora_meta import LoraGroup

PDL_TOKENS = 256  # of a step whose launches overlap; larger ones are bound by products
ONTO_TOKENS = 1024
FIRST_TOKENS = 32
O_GROUP = 1  # of qkv, o, gate_up, down


@dataclass(frozen=True, slots=True)
class Overlap:
    """Switches, for tests and for finding out what each is worth."""

    products: int = PRODUCT_ROWS  # tokens of the largest step whose products are `kernels.product`, not the library's
    pdl: bool = True  # a kernel may start before the one ahead of it has ended; changes no result
    first: int = FIRST_TOKENS  # of the largest step whose o has shrink placed before the product
    onto: int = ONTO_TOKENS  # tokens above which a product is added onto LoRA's delta, where that is known to be large

    def product(self, tokens: int, weight: Tensor, *, lora: bool) -> bool:
        """Whether a product is ours. weight: [out, in]; lora: shrink and expand run beside it.

        Steps of twice as many tokens are where the weight's rows are long (down's), and beside LoRA where they are not
        very short (gate_up's).
        """
        features, inner = weight.shape
        twice = features <= 2 * inner if lora else inner > 2 * features
        return weight.dtype.itemsize == 2 and tokens <= self.products * (2 if twice else 1)

    def dependent(self, tokens: int) -> bool:
        return self.pdl and tokens <= PDL_TOKENS

    def lora_first(self, tokens: int, group: LoraGroup) -> bool:
        """Whether multiprocessors go to shrink and expand before the product that is ours.

        For o of small steps: the product's programs wait for room among attention's, and would keep shrink's, which
        find some, from starting before attention has ended. Elsewhere they would take the product's place.
        """
        return tokens <= self.first and group.index == O_GROUP

    def large(self, tokens: int) -> bool:
        """Whether it counts which groups of a step's modules have adapters; its products are the library's."""
        return tokens > max(self.onto, 2 * self.products)

    def adds_onto(self, tokens: int, rows: int) -> bool:
        """rows: of the tokens, those with an adapter. The product reads the delta while it computes; writing zeros for
        the others must not cost more than that saves.
        """
        return self.large(tokens) and 2 * rows >= tokens


NEVER = 1 << 30
OFF = Overlap(products=0, pdl=False, onto=NEVER)


def default_overlap(device: torch.device) -> Overlap:
    """All where the device has bulk fetches, dependent launches and the shared memory that our products' tiles take.

    Compute capability 12 has 100 KB a block of the latter, 9 to 11 have 227.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if major < 9:
        return OFF
    return Overlap() if major < 12 else Overlap(products=0)

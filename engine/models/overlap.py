"""What small steps do to keep memory busy (launches that do not wait in line, products that fetch their weights ahead)
and large ones to write and read less (products that do what follows them).

Used by the device decoder; what each is worth is in docs/performance.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import DECODE_TOKENS, PRODUCT_ROWS, large_fill, multiprocessors
from kernels.lora_meta import LARGE_ROWS, LARGE_TOKENS, LoraGroup

KEEP_TOKENS = 128  # of the largest step whose activations fill but a part of the second-level cache
PDL_TOKENS = 1024  # of a step whose launches overlap: of those in graphs; larger ones are bound by products
FIRST_TOKENS = 24
MANY_DECODES = 64  # enough for a stream of their own to pay
O_GROUP, GATE_UP_GROUP = 1, 2  # of qkv, o, gate_up, down


@dataclass(frozen=True, slots=True)
class Overlap:
    """Switches, for tests and for finding out what each is worth."""

    products: int = PRODUCT_ROWS  # tokens of the largest step whose products are `kernels.product`, not the library's
    pdl: bool = True  # a kernel may start before the one ahead of it has ended; changes no result
    keep: int = KEEP_TOKENS  # of the largest step whose activations are to stay in the cache; changes no result
    first: int = FIRST_TOKENS  # of the largest step whose o has shrink placed before the product
    large: int = LARGE_TOKENS  # tokens from which on products do what follows them
    fill: float = 0.84  # of the turns of a large o or down that takes the adapters' delta in; see `large_fill`
    decodes_each: int = 2  # programs a multiprocessor of decode attention beside a large prefill's; 0: all behind it
    widest: int = 2  # bytes of an element, of products that are not the library's alone

    def product(self, tokens: int, weight: Tensor, *, lora: bool) -> bool:
        """Whether a product is ours. weight: [out, in]; lora: shrink and expand run beside it.

        Steps of twice as many tokens are where the weight's rows are long (down's), and where they are not very short
        (gate_up's) beside LoRA or if the tokens fill the product's tile.
        """
        features, inner = weight.shape
        full = tokens == 2 * self.products
        twice = features <= 2 * inner if lora or full else inner > 2 * features
        return self._narrow(weight) and tokens <= self.products * (2 if twice else 1)

    def dependent(self, tokens: int) -> bool:
        return self.pdl and tokens <= PDL_TOKENS

    def keeps(self, tokens: int) -> bool:
        """Whether activations are stored to outlast, in the second-level cache, the weights that are read meanwhile."""
        return tokens <= self.keep

    def early(self, tokens: int) -> bool:
        """Whether shrink may start before what makes its input has ended.

        Between the two it takes room from our own products of qkv, o and down.
        """
        return tokens <= self.products or tokens > 2 * PRODUCT_ROWS

    def lora_first(self, tokens: int, group: LoraGroup) -> bool:
        """Whether multiprocessors go to shrink and expand before the product.

        Beside our own products for o of small steps: the product's programs wait for room among attention's, and would
        keep shrink's, which find some, from starting before attention has ended. Elsewhere they would take the
        product's place. In larger steps products leave no room beside them, so that shrink would start when they end;
        but the library's gate_up at decode is more programs than there are multiprocessors, and leaves some in the end.
        """
        if tokens <= self.products:
            return tokens <= self.first and group.index == O_GROUP
        return group.index != GATE_UP_GROUP or not PRODUCT_ROWS < tokens <= DECODE_TOKENS

    def merges(self, tokens: int, weight: Tensor, *, lora: bool) -> bool:
        """Whether SiLU-and-mul, and the adapters' delta, are a part of gate_up's product.

        In small steps where the tokens fill its tile and no adapter has a delta.
        """
        full = tokens == LARGE_ROWS and not lora and self.products > 0
        return (full or tokens >= self.large) and self._narrow(weight) and self._tiled(weight)

    def onto_residual(self, tokens: int, weight: Tensor) -> bool:
        """Whether o's product, or down's, is added onto the residual stream."""
        return tokens > self.large and self._narrow(weight)

    def takes_delta(self, tokens: int, weight: Tensor) -> bool:
        """Whether that product takes the adapters' delta in, which the library's does not.

        Ours is no faster, so it takes many turns, of which the last is nearly full.
        """
        features, itemsize = weight.shape[0], weight.dtype.itemsize
        fill = large_fill(tokens, features, itemsize, multiprocessors(weight.device))
        return tokens > 2 * self.large and fill >= self.fill and self._tiled(weight)

    def decodes_beside(self, tokens: int, decodes: int | None) -> int:
        """Programs a multiprocessor of decode attention that run beside prefill attention; 0: all behind it.

        Few leave the memory waiting between sequences, so there has to be enough of a prompt to hide that; and enough
        of them to be worth a second stream. decodes: None where it is not known how many there are.
        """
        many = decodes is None or decodes >= MANY_DECODES
        return self.decodes_each if many and tokens > self.large else 0

    def _tiled(self, weight: Tensor) -> bool:
        """Whether its rows are what TMA can read: `kernels.large_product`."""
        return weight.shape[1] % 8 == weight.shape[0] % 16 == 0

    def _narrow(self, weight: Tensor) -> bool:
        return weight.dtype.itemsize <= self.widest


NEVER = 1 << 30
OFF = Overlap(products=0, pdl=False, keep=0, large=NEVER)


def default_overlap(device: torch.device) -> Overlap:
    """All where the device has bulk fetches, dependent launches and the shared memory that our products' tiles take.

    Compute capability 12 has 100 KB a block of the latter, 9 to 11 have 227.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if major < 9:
        return OFF
    return Overlap() if major < 12 else Overlap(products=0, large=NEVER)

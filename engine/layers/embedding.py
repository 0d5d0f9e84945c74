"""Token embedding and output head; one matrix serves both where the checkpoint ties them."""

from torch import Tensor

from engine.layers.linear import Product, make_product


class Embedding:
    """Rows of the embedding matrix."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight  # [vocab, hidden]

    def __call__(self, ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden]."""
        return self._weight.index_select(0, ids)


def make_head(weight: Tensor) -> Product:
    """The product that turns hidden states into logits, from [vocab, hidden]."""
    return make_product(weight)

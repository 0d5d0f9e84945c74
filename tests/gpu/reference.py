"""transformers on the device, adapters as hooks on its modules: what a request's logits must be, given its tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.models.dims import LORA_MODULES

Weights = Mapping[tuple[int, int], tuple[Tensor, Tensor]]  # (layer, module) -> A [r, in], B [out, r], scaled


class DeviceReference:
    """One checkpoint in one dtype; the adapters' weights are those that the server holds, rounded to `rounded`."""

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[int, Weights],
        dtype: torch.dtype,
        rounded: torch.dtype,
        device: str = "cuda",
    ) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.eval().to(device)
        self._device = device
        self._adapters = {
            adapter: {place: tuple(x.to(rounded).to(dtype).to(device) for x in pair) for place, pair in weights.items()}
            for adapter, weights in adapters.items()
        }

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], adapter: int | None) -> Tensor:
        """[len(tokens), vocab] float32 on the device: row i is what follows tokens[: i + 1]."""
        with self._applied(adapter):
            return self._model(torch.tensor([list(tokens)], device=self._device)).logits[0].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], adapter: int | None, count: int) -> list[int]:
        ids = torch.tensor([list(prompt)], device=self._device)
        with self._applied(adapter):
            out = self._model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    @contextmanager
    def _applied(self, adapter: int | None) -> Iterator[None]:
        weights = {} if adapter is None else self._adapters[adapter]
        hooks = [self._module(*place).register_forward_hook(_delta(*pair)) for place, pair in weights.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _module(self, layer: int, module: int) -> Any:
        block = "self_attn" if module < 4 else "mlp"
        return getattr(getattr(self._model.model.layers[layer], block), LORA_MODULES[module])


def _delta(a: Tensor, b: Tensor) -> Any:
    return lambda _module, inputs, output: output + F.linear(F.linear(inputs[0], a), b)

"""transformers + PEFT in float32 on the CPU: what a request's logits must be, given its tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM


class Reference:
    """A checkpoint and adapters by name. One forward pass over a whole sequence; what was asked once is remembered."""

    def __init__(self, model: Path, adapters: Mapping[str, Path] | None = None) -> None:
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._base = base.eval()
        self._peft: Any = None
        self._known: dict[tuple[str | None, tuple[int, ...]], Tensor] = {}
        for name, folder in (adapters or {}).items():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._base, folder, adapter_name=name)
            else:
                self._peft.load_adapter(folder, adapter_name=name)
        if self._peft is not None:
            self._peft.eval()

    def logits(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """[len(tokens), vocab] float32: row i is what follows tokens[: i + 1]."""
        key = (adapter, tuple(tokens))
        if key not in self._known:
            self._known[key] = self._forward(torch.tensor([list(tokens)]), adapter)
        return self._known[key]

    def exact_logits(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """The same in float64, for positions where float32's own rounding is in doubt; not remembered."""
        model = self._base if self._peft is None else self._peft
        model.double()
        try:
            return self._forward(torch.tensor([list(tokens)]), adapter)
        finally:
            model.float()  # back to the very weights: float64 holds them exactly

    @torch.inference_mode()
    def _forward(self, ids: Tensor, adapter: str | None) -> Tensor:
        if self._peft is None:
            assert adapter is None
            return self._base(ids).logits[0]  # type: ignore[no-any-return]
        if adapter is None:
            with self._peft.disable_adapter():
                return self._peft(ids).logits[0]  # type: ignore[no-any-return]
        self._peft.set_adapter(adapter)
        return self._peft(ids).logits[0]  # type: ignore[no-any-return]

"""Where a decoder's weights come from: safetensors files, one or many, or random numbers for benchmarks."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from engine.models.config import ModelConfig, UnsupportedModelError

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class WeightSource(Protocol):
    """Tensors by name, with a prefix such as `model.` already understood."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The named tensor in the wanted dtype. Raises UnsupportedModelError where it is missing or misshapen."""
        ...

    def has(self, name: str) -> bool: ...


class SafetensorsSource:
    """Lazily reads `model.safetensors`, or the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stack = ExitStack()
        self._files: dict[str, object] = {}  # tensor name -> open file
        for path in _shards(folder):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def has(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise UnsupportedModelError(f"the checkpoint has no tensor {name}")
        tensor: Tensor = self._files[name].get_tensor(name)  # type: ignore[attr-defined]
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor.to(self._dtype)

    def close(self) -> None:
        self._stack.close()


class DummySource:
    """Random weights of a plausible scale, the same in each run."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, device: torch.device | None = None) -> None:
        self._dtype = dtype
        self._device = torch.device("cpu") if device is None else device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def has(self, name: str) -> bool:
        return True

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if len(shape) == 1:
            return tensor.fill_(0.0 if "bias" in name else 1.0)
        return tensor.normal_(0.0, 0.02, generator=self._generator)

    def close(self) -> None:
        pass


def open_weights(
    folder: Path, load_format: str, dtype: torch.dtype, device: torch.device | None = None
) -> SafetensorsSource | DummySource:
    """`load_format` is auto or dummy; random numbers are made on the device."""
    return DummySource(dtype, device=device) if load_format == "dummy" else SafetensorsSource(folder, dtype)


def head_is_tied(config: ModelConfig, source: WeightSource) -> bool:
    """Whether the output head is the embedding: by the config, or since the checkpoint has no other."""
    return config.tie_word_embeddings or not source.has("lm_head.weight")


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    if not single.exists():
        raise UnsupportedModelError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    return [single]

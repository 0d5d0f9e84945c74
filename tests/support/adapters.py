"""Random PEFT adapters on disk, strong enough that their answers differ from the base's at once."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.models.dims import LORA_MODULES, ModelDims
from tests.support.models import module_path, read_dims

PREFIX = "base_model.model.model.layers"


def write_adapter(
    folder: Path,
    dims_or_model_folder: ModelDims | Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    modules: Sequence[str] = LORA_MODULES,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    std: float = 0.2,
    target_modules: Sequence[str] | str | None = None,
    dtype: torch.dtype = torch.float32,
    prefix: str = PREFIX,
    **config: Any,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does; returns the folder.

    A has standard deviation 1/sqrt(in), B `std`: the delta of a unit input is about alpha * std / sqrt(rank).
    `target_modules` (default: `modules`) is written as given; further keywords go into the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dims = dims_or_model_folder if isinstance(dims_or_model_folder, ModelDims) else read_dims(dims_or_model_folder)
    tensors = adapter_tensors(
        dims, rank=rank, modules=modules, layers=layers, seed=seed, rank_pattern=rank_pattern, std=std, prefix=prefix
    )
    targets = target_modules if isinstance(target_modules, str) else list(target_modules or modules)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": use_rslora,
        "target_modules": targets,
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "layers_to_transform": None if layers is None else list(layers),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def adapter_tensors(
    dims: ModelDims,
    *,
    rank: int = 8,
    modules: Sequence[str] = LORA_MODULES,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    rank_pattern: dict[str, int] | None = None,
    std: float = 0.2,
    prefix: str = PREFIX,
) -> dict[str, torch.Tensor]:
    """Float32 A [rank, in] and B [out, rank] of every module under the keys that PEFT writes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(dims.layers) if layers is None else layers:
        for module in modules:
            name = f"{prefix}.{layer}.{module_path(module)}"
            ranks = _module_rank(name, rank, rank_pattern or {})
            inputs, outputs = dims.module_shape(module)
            tensors[f"{name}.lora_A.weight"] = torch.randn(ranks, inputs, generator=generator) / math.sqrt(inputs)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, ranks, generator=generator) * std
    return tensors


def _module_rank(name: str, rank: int, patterns: dict[str, int]) -> int:
    """The first pattern that matches the module's name, or a dotted suffix of it, gives its rank."""
    path = name.removeprefix("base_model.model.")
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), rank)

"""Reads an adapter in PEFT's format and checks it against the base's shape and the server's limits, whole and at once.

Every tensor binds to a module, every module that the config targets has its tensors, or the adapter is refused.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.adapters.binding import Binding, bind
from engine.adapters.pages import ReusedPages
from engine.adapters.peft_config import MAX_CONFIG_BYTES, LoraSettings, parse_settings
from engine.adapters.source import open_adapter_file
from engine.adapters.spec import AdapterLimits, AdapterSpec, ModuleSpec, invalid
from engine.adapters.targets import Names, ends_with
from engine.adapters.tensorfile import Entry, Header, all_finite, read_body, read_header, tensor_of
from engine.models.dims import LORA_MODULES, ModelDims
from engine.types import CONFIG_FILE, TENSORS_FILE
from engine.worker.breaks import at_once

LOOKED_AT_ONCE = 1 << 20  # values


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's weights as in the file; the scale is not in them."""

    a: Tensor  # [rank, in] float32, float16 or bfloat16
    b: Tensor  # [out, rank] likewise


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A whole adapter in memory. `pairs` has one entry for each of `spec.modules`, by (layer, module index)."""

    spec: AdapterSpec
    pairs: dict[tuple[int, int], LoraPair]


def read_adapter(
    folder: Path, dims: ModelDims, limits: AdapterLimits, turn: Callable[[], None] = at_once,
    pages: ReusedPages | None = None,
) -> AdapterFile:  # fmt: skip
    """Blocking; calls `turn` between parts of the work. Who reads many files has `pages` for them.

    Raises EngineError (ADAPTER_INVALID) with a reason that its user understands.
    """
    config = _read_config(folder)
    settings = parse_settings(config)
    with open_adapter_file(folder, TENSORS_FILE) as stream:
        size = os.fstat(stream.fileno()).st_size
        header = read_header(stream, size)
        turn()
        binding = bind(header.entries)
        turn()
        modules = _check(binding, settings, dims, limits, turn)
        turn()
        digest = _begin_hash(config, header)

        def seen(part: memoryview) -> None:
            digest.update(part)
            turn()

        body = read_body(stream, header, seen, pages or ReusedPages())
    pairs = dict[tuple[int, int], LoraPair]()
    for key, (a, b) in binding.pairs.items():
        pairs[key] = LoraPair(tensor_of(body, a), tensor_of(body, b))
        turn()
    _check_finite(pairs, binding, body, turn)
    spec = AdapterSpec(modules, digest.hexdigest(), len(config) + size)
    return AdapterFile(spec, pairs)


def inspect_limits(folders: Iterable[Path]) -> tuple[int, tuple[str, ...]]:
    """The largest rank and the modules of these adapters, from their headers alone: what --lora-paths implies.

    Raises EngineError (ADAPTER_INVALID) with the reason.
    """
    rank, modules = 1, set[int]()
    for folder in folders:
        pairs = _bound(folder).pairs
        rank = max(rank, *(a.shape[0] if a.shape else 0 for a, _ in pairs.values()))
        modules |= {module for _, module in pairs}
    return rank, tuple(name for index, name in enumerate(LORA_MODULES) if index in modules)


def _bound(folder: Path) -> Binding:
    parse_settings(_read_config(folder))
    with open_adapter_file(folder, TENSORS_FILE) as stream:
        return bind(read_header(stream, os.fstat(stream.fileno()).st_size).entries)


def _read_config(folder: Path) -> bytes:
    with open_adapter_file(folder, CONFIG_FILE, MAX_CONFIG_BYTES) as stream:
        return stream.read(MAX_CONFIG_BYTES)


def _check(
    binding: Binding, settings: LoraSettings, dims: ModelDims, limits: AdapterLimits, turn: Callable[[], None]
) -> tuple[ModuleSpec, ...]:
    _check_layers(binding, settings, dims)
    _check_targets(binding, settings, dims)
    turn()
    return tuple(_check_module(binding, key, settings, dims, limits) for key in sorted(binding.pairs))


def _check_layers(binding: Binding, settings: LoraSettings, dims: ModelDims) -> None:
    layers = {layer for layer, _ in binding.pairs} | (settings.targets.layers or frozenset())
    if max(layers) >= dims.layers:
        raise invalid(
            f"the adapter is for layer {max(layers)}, this base model has layers 0 to {dims.layers - 1}: "
            "it was trained for another base model"
        )


def _check_targets(binding: Binding, settings: LoraSettings, dims: ModelDims) -> None:
    """The config's targets and the file's tensors are the same set of modules."""
    targets = settings.targets
    names = {binding.name(*key): key for key in product(range(dims.layers), range(len(LORA_MODULES)))}
    for target in targets.modules.names if isinstance(targets.modules, Names) else ():
        if not any(ends_with(name, target) for name in names) and not targets.exclude.matches(target):
            raise invalid(
                f"{CONFIG_FILE}: target_modules: {target!r} names no module that can be adapted here "
                f"(supported: {', '.join(LORA_MODULES)})"
            )
    for name, key in names.items():
        wanted, found = targets.cover(name, key[0]), key in binding.pairs
        if wanted and not found:
            raise invalid(f"{CONFIG_FILE} targets {name}, but {TENSORS_FILE} has no tensors for it")
        if found and not wanted:
            raise invalid(f"{TENSORS_FILE} has tensors for {name}, which {CONFIG_FILE} does not target")


def _check_module(
    binding: Binding, key: tuple[int, int], settings: LoraSettings, dims: ModelDims, limits: AdapterLimits
) -> ModuleSpec:
    (layer, module), (a, b) = key, binding.pairs[key]
    name, kind = binding.name(layer, module), LORA_MODULES[module]
    if kind not in limits.modules:
        raise invalid(
            f"{kind} is among the adapter's modules; this server takes {', '.join(limits.modules)} "
            "(--lora-target-modules)"
        )
    rank = settings.rank_of(name)
    inputs, outputs = dims.module_shape(kind)
    _check_shape(a, (rank, inputs), axis=0)
    _check_shape(b, (outputs, rank), axis=1)
    if rank > limits.max_rank:
        raise invalid(f"{name} has rank {rank}; this server takes at most {limits.max_rank} (--max-lora-rank)")
    return ModuleSpec(layer, module, rank, settings.scale_of(name, rank))


def _check_shape(entry: Entry, expected: tuple[int, int], *, axis: int) -> None:
    """`axis` is the one that holds the rank."""
    if entry.shape == expected:
        return
    found = f"{entry.name} has shape {list(entry.shape)}, expected {list(expected)}"
    if len(entry.shape) == 2 and entry.shape[1 - axis] == expected[1 - axis]:
        raise invalid(f"{found}: {CONFIG_FILE} gives it rank {expected[axis]}")
    raise invalid(f"{found}: the adapter was trained for a base model of another shape")


def _check_finite(
    pairs: dict[tuple[int, int], LoraPair], binding: Binding, body: NDArray[np.uint8], turn: Callable[[], None]
) -> None:
    """Where all tensors have one dtype the body is looked at in large parts; only a fault's place is searched."""
    dtypes = {entry.dtype for pair in binding.pairs.values() for entry in pair}
    if len(dtypes) == 1 and _all_finite(torch.from_numpy(body).view(dtypes.pop()), turn):
        return
    for key, pair in pairs.items():
        for entry, tensor in zip(binding.pairs[key], (pair.a, pair.b), strict=True):
            if not all_finite(tensor):
                raise invalid(f"{entry.name} holds NaN or infinite values")


def _all_finite(values: Tensor, turn: Callable[[], None]) -> bool:
    for part in torch.split(values, LOOKED_AT_ONCE):
        if not all_finite(part):
            return False
        turn()
    return True


def _begin_hash(config: bytes, header: Header) -> "hashlib._Hash":
    digest = hashlib.sha256(len(config).to_bytes(8, "little"))
    digest.update(config)
    digest.update(header.raw)
    return digest

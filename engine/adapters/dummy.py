"""Adapters of random weights made in memory, for measurements: what --load-format dummy is for the base.

Their source reads `random-RANK-MODULES-SEED`, such as `random-16-all-7` or `random-8-qkvo-12`; each seed has weights of
its own. Every other source is read as ever.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters.intake import AdapterReader
from engine.adapters.peft import AdapterFile, LoraPair
from engine.adapters.spec import AdapterLimits, AdapterSpec, ModuleSpec, invalid
from engine.models.dims import LORA_MODULES, ModelDims
from engine.worker.breaks import Breaks

LETTERS = {module[0]: index for index, module in enumerate(LORA_MODULES)}
_SOURCE = re.compile(r"random-([1-9]\d{0,3})-(all|[qkvogud]{1,7})-(\d{1,9})")
_POOL = 1 << 24  # random numbers that all adapters are cut from, each at places of its own
_STD = 0.02


class DummyReader(AdapterReader):
    """Reads what is named as random from a pool of random numbers; a thread may call it at any time."""

    def __init__(
        self, dims: ModelDims, limits: AdapterLimits, base: str, breaks: Breaks, inside: Path | None = None
    ) -> None:
        super().__init__(dims, limits, base, breaks, inside)
        generator = torch.Generator().manual_seed(0)
        self._pool = (torch.randn(_POOL, generator=generator) * _STD).bfloat16()

    def read(self, source: str, revision: str | None) -> AdapterFile:
        """Raises EngineError where the rank or a module is beyond the server's limits."""
        if (found := _SOURCE.fullmatch(source)) is None:
            return super().read(source, revision)
        rank, letters, seed = int(found[1]), found[2], int(found[3])
        modules = sorted(LETTERS.values() if letters == "all" else {LETTERS[letter] for letter in letters})
        self._refuse(source, rank, modules)
        specs = tuple(ModuleSpec(layer, m, rank, 1.0) for layer in range(self._dims.layers) for m in modules)
        pairs = {(spec.layer, spec.module): self._pair(spec, seed) for spec in specs}
        size = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values())
        return AdapterFile(AdapterSpec(specs, source, size), pairs)

    def _refuse(self, source: str, rank: int, modules: list[int]) -> None:
        if rank > self._limits.max_rank:
            raise invalid(f"{source}: rank {rank}; this server takes at most {self._limits.max_rank} (--max-lora-rank)")
        for module in modules:
            if LORA_MODULES[module] not in self._limits.modules:
                raise invalid(f"{source}: this server takes no {LORA_MODULES[module]} (--lora-target-modules)")

    def _pair(self, spec: ModuleSpec, seed: int) -> LoraPair:
        inputs, outputs = self._dims.module_shape(LORA_MODULES[spec.module])
        place = 2 * (spec.layer * len(LORA_MODULES) + spec.module)
        return LoraPair(
            self._cut(seed, place, (spec.rank, inputs)), self._cut(seed, place + 1, (outputs, spec.rank))
        )  # fmt: skip

    def _cut(self, seed: int, place: int, shape: tuple[int, int]) -> Tensor:
        size = shape[0] * shape[1]
        first = (seed * 1_000_003 + place * 7_919) * 64 % (_POOL - size)
        return self._pool[first : first + size].view(shape)

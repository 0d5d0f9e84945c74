"""What is known of an adapter without its weights: plain numbers for the brain, the layout and the host tier."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.models.dims import LORA_MODULES
from engine.types import EngineError, ErrorCode


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module of one layer that the adapter changes by scale * B @ A."""

    layer: int
    module: int  # position in LORA_MODULES
    rank: int
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """`modules` is sorted by layer and module and never empty."""

    modules: tuple[ModuleSpec, ...]
    content_hash: str  # sha256 over config and tensors, hexadecimal
    file_bytes: int

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules)

    @property
    def module_names(self) -> tuple[str, ...]:
        """The modules that it has in any layer, in the order of LORA_MODULES."""
        present = {module.module for module in self.modules}
        return tuple(name for index, name in enumerate(LORA_MODULES) if index in present)


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What the server was started for: --max-lora-rank and --lora-target-modules."""

    max_rank: int
    modules: tuple[str, ...] = LORA_MODULES


def normalize_target_modules(names: Sequence[str]) -> tuple[str, ...]:
    """The modules that --lora-target-modules names, in the order of LORA_MODULES; `all` stands for all seven.

    Raises EngineError (INVALID_REQUEST) for an unknown or missing name.
    """
    if unknown := [name for name in names if name not in (*LORA_MODULES, "all")]:
        known = ", ".join(LORA_MODULES)
        raise EngineError(ErrorCode.INVALID_REQUEST, f"--lora-target-modules {unknown[0]}: expected all, {known}")
    if not names:
        raise EngineError(ErrorCode.INVALID_REQUEST, "--lora-target-modules: at least one module is needed")
    return LORA_MODULES if "all" in names else tuple(name for name in LORA_MODULES if name in names)


def invalid(reason: str) -> EngineError:
    """The error of every adapter that cannot be served."""
    return EngineError(ErrorCode.ADAPTER_INVALID, reason)

"""What is known of an adapter without its weights: plain numbers for the brain, the layout and the host tier."""

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


def invalid(reason: str) -> EngineError:
    """The error of every adapter that cannot be served."""
    return EngineError(ErrorCode.ADAPTER_INVALID, reason)

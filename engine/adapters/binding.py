"""Binds the tensors' names in an adapter's file to (layer, module, side) by their last components."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.adapters.spec import invalid
from engine.adapters.tensorfile import Entry
from engine.models.dims import LORA_MODULES
from engine.types import TENSORS_FILE

PEFT_PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps
BLOCKS = {module: "self_attn" if module in LORA_MODULES[:4] else "mlp" for module in LORA_MODULES}
_NAME = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)layers\.(?P<layer>[0-9]{1,6})\."
    rf"(?P<path>{'|'.join(f'{block}[.]{module}' for module, block in BLOCKS.items())})"
    r"\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech|encoder|draft|mtp", re.IGNORECASE)
_REASONS = (
    (r"lora_magnitude_vector", "DoRA is not supported"),
    (r"lora_embedding_|embed_tokens|lm_head|wte", "adapters on the embedding or the output head are not supported"),
    (r"token_adapter|trainable_tokens", "new or retrained tokens are not supported"),
    (r"modules_to_save", "modules trained whole are not supported"),
    (r"\.bias$", "biases are not supported"),
    (r"experts", "experts are not supported"),
    (r"(qkv_proj|gate_up_proj|query_key_value|c_attn)", "merged projections are not supported, only q, k, v, gate, up"),
)


@dataclass(frozen=True, slots=True)
class Binding:
    """Entries (A, B) by (layer, module index). `prefix` comes before `layers` in the names that PEFT matches."""

    prefix: str
    pairs: Mapping[tuple[int, int], tuple[Entry, Entry]]

    def name(self, layer: int, module: int) -> str:
        """The module as PEFT saw it in training, such as `model.layers.0.self_attn.q_proj`."""
        kind = LORA_MODULES[module]
        return f"{self.prefix}layers.{layer}.{BLOCKS[kind]}.{kind}"


def bind(entries: Mapping[str, Entry]) -> Binding:
    """Raises EngineError (ADAPTER_INVALID) for a tensor that binds to nothing, or lacks its other half."""
    if not entries:
        raise invalid(f"{TENSORS_FILE} holds no tensors")
    bound = {name: _match(name) for name in entries}
    prefix = _only((match["prefix"], match["adapter"] or "") for match in bound.values())
    sides: dict[tuple[int, int], dict[str, Entry]] = {}
    for name, match in bound.items():
        module = LORA_MODULES.index(match["path"].rpartition(".")[2])
        sides.setdefault((int(match["layer"]), module), {})[match["side"]] = entries[name]
    return Binding(prefix, {key: _pair(found) for key, found in sides.items()})


def _match(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None or _OTHER_TOWER.search(match["prefix"]):
        reason = next((text for pattern, text in _REASONS if re.search(pattern, name)), "")
        raise invalid(
            f"{TENSORS_FILE}: tensor {name[:200]} binds to no module of this model"
            + (f": {reason}" if reason else f" (supported: lora_A and lora_B of {', '.join(LORA_MODULES)})")
        )
    return match


def _only(found: Iterable[tuple[str, str]]) -> str:
    """The one prefix of all names, without what PEFT itself adds."""
    kinds = sorted(set(found))
    if len(kinds) > 1:
        raise invalid(f"{TENSORS_FILE}: tensors of different models or adapters: {kinds[0]} and {kinds[1]}")
    return kinds[0][0].removeprefix(PEFT_PREFIX)


def _pair(found: Mapping[str, Entry]) -> tuple[Entry, Entry]:
    match found:
        case {"A": a, "B": b}:
            return a, b
    (side, entry), other = next(iter(found.items())), "B" if "A" in found else "A"
    raise invalid(f"{TENSORS_FILE}: {entry.name} has no lora_{other} beside its lora_{side}")

"""Architecture name to family. The only place that knows which checkpoints are understood."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from engine.models.config import Json, ModelConfig, UnsupportedModelError, parse_common, read_json
from engine.models.llama import llama
from engine.models.mistral import mistral
from engine.models.qwen import qwen2, qwen3

Family = Callable[[Json, ModelConfig], ModelConfig]

FAMILIES = MappingProxyType(
    {
        "LlamaForCausalLM": llama,
        "MistralForCausalLM": mistral,
        "Qwen2ForCausalLM": qwen2,
        "Qwen3ForCausalLM": qwen3,
    }
)


def load_config(folder: Path) -> ModelConfig:
    """Reads config.json and generation_config.json. Raises UnsupportedModelError for what the decoder does not do."""
    raw = read_json(folder / "config.json")
    if not raw:
        raise UnsupportedModelError(f"{folder} has no config.json")
    return parse_config(raw, read_json(folder / "generation_config.json"))


def parse_config(raw: Json, generation: Json = {}) -> ModelConfig:  # noqa: B006
    """The same from parsed JSON."""
    names = raw.get("architectures") or ["(none)"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise UnsupportedModelError(f"architecture {names[0]} is not supported; known: {', '.join(FAMILIES)}")
    return family(raw, parse_common(raw, generation))

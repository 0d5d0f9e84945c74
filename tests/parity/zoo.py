"""Tiny checkpoints of odd shapes, adapters of every kind for them, and prompts."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, LoraPath
from engine.types import SamplingParams
from tests.parity.judge import Ask
from tests.parity.reference import Reference
from tests.support.adapters import write_adapter
from tests.support.models import write_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VOCAB = 300
GREEDY = SamplingParams(max_tokens=12, seed=0, temperature=0.0, ignore_eos=True, logprobs=2)

SHAPES: dict[str, dict[str, Any]] = {
    "gqa3": {"layers": 3, "hidden": 72, "heads": 6, "kv_heads": 2, "head_dim": 20, "intermediate": 104},
    "mqa-tied": {
        "layers": 2, "hidden": 50, "heads": 5, "kv_heads": 1, "head_dim": 24, "intermediate": 56,
        "tie_word_embeddings": True,
    },
    "mha-one-layer": {"layers": 1, "hidden": 40, "heads": 5, "kv_heads": 5, "head_dim": 8, "intermediate": 200},
    "biased": {
        "layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 36, "intermediate": 72,
        "attention_bias": True,
    },
    "mistral": {
        "model_type": "mistral", "layers": 2, "hidden": 56, "heads": 4, "kv_heads": 2, "head_dim": 28,
        "intermediate": 88, "sliding_window": 21,
    },
    "qwen2": {
        "model_type": "qwen2", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "intermediate": 72, "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "layers": 2, "hidden": 40, "heads": 6, "kv_heads": 2, "head_dim": 12,
        "intermediate": 104,
    },
}  # fmt: skip

ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"rank": 1, "alpha": 1, "modules": ("q_proj", "v_proj"), "std": 0.5},
    "five": {"rank": 5, "alpha": 2, "use_rslora": True, "modules": ATTENTION},
    "sixteen": {"rank": 16, "alpha": 8, "modules": MLP},
    "patterns": {
        "rank": 64, "alpha": 64, "target_modules": "all-linear", "std": 0.1,
        "rank_pattern": {"layers.0.self_attn.q_proj": 24, "down_proj": 7},
        "alpha_pattern": {"v_proj": 20, "layers.0.mlp.up_proj": 5},
    },
    "regex": {
        "rank": 100, "alpha": 40, "target_modules": r".*\.(self_attn\.q|mlp\.up)_proj", "std": 0.1,
        "modules": ("q_proj", "up_proj"),
    },
    "huge": {"rank": 256, "alpha": 8, "use_rslora": True, "std": 0.1},
    "first-layer": {"rank": 8, "alpha": 16, "layers": (0,), "modules": ("k_proj", "o_proj", "gate_proj")},
}  # fmt: skip


@dataclass(frozen=True)
class Zoo:
    """A checkpoint with its adapters on disk, and the reference over them."""

    folder: Path
    adapters: dict[str, Path]
    reference: Reference

    def config(self, names: Iterable[str] | None = None, **settings: Any) -> EngineConfig:
        """An engine with these adapters (all of them where none are named), in float32 on one thread."""
        chosen = self.adapters if names is None else names
        defaults: dict[str, Any] = {
            "model_path": str(self.folder),
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "context_length": 256,
            "max_total_tokens": 16384,
            "max_running_requests": 32,
            "chunked_prefill_size": 256,
            "lora_paths": tuple(LoraPath(name=name, path=str(self.adapters[name])) for name in chosen),
            "max_host_lora_bytes": 64 << 20,
        }
        return EngineConfig(**(defaults | settings))


def make_zoo(folder: Path, shape: str = "gqa3") -> Zoo:
    model = write_model(folder / "model", vocab=VOCAB, seed=1, **SHAPES[shape])
    adapters = {
        name: write_adapter(folder / name, model, seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    return Zoo(model, adapters, Reference(model, adapters))


def prompts(count: int, least: int, most: int, *, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Random token ids; no two prompts start alike."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab) for _ in range(draw.randint(least, most))] for _ in range(count)]


def asks(
    count: int, owners: Iterable[str | None], *, least: int = 1, most: int = 60, seed: int = 0, **params: Any
) -> list[Ask]:
    """`count` greedy requests, the owners in turn."""
    import msgspec

    names = list(owners)
    chosen = msgspec.structs.replace(GREEDY, **params)
    return [Ask(p, names[i % len(names)], chosen) for i, p in enumerate(prompts(count, least, most, seed=seed))]

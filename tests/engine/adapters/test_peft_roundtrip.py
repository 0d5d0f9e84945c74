"""Adapters that PEFT itself made and saved: the same modules, the same scaling, the same weight deltas."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from engine.adapters.host import HostTier
from engine.adapters.layout import SIDE_A
from engine.adapters.peft import inspect_limits, read_adapter
from engine.adapters.spec import AdapterLimits
from engine.geometry import make_geometry
from engine.models.dims import LORA_MODULES, ModelDims
from tests.support.models import read_dims, write_model

LAYER_1_TO_9 = r"model\.layers\.[1-9]\..*\.(q_proj|up_proj)"
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "all-linear": {"r": 3, "target_modules": "all-linear"},
    "regex": {"r": 5, "target_modules": LAYER_1_TO_9},
    "rank-pattern": {
        "r": 4,
        "target_modules": list(LORA_MODULES),
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 7, "v_proj": 2, r"layers\.\d+\.mlp\..*": 12, "up_proj": 1},
    },
    "alpha-pattern": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "k_proj": 5, "model.layers.0.mlp.up_proj": 1},
    },
    "both-rslora": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"1.self_attn.k_proj": 3, "q_proj": 5},
        "alpha_pattern": {".*attn.*": 11},
    },
    "some-layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "one-layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"r": 4, "target_modules": list(LORA_MODULES), "exclude_modules": ["k_proj", "0.mlp.up_proj"]},
    "excluded-regex": {"r": 4, "target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.2\.mlp\..*"},
    "full-names": {"r": 4, "target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.v_proj"]},
    "random-init": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False},
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "dropout": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.5, "task_type": "CAUSAL_LM"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), layers=3, hidden=24, heads=3, kv_heads=1, head_dim=8)


class Wrapper(nn.Module):
    """A model inside another, as the text part of a multimodal one is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.language_model = model


def save(model: nn.Module, folder: Path, **config: Any) -> tuple[nn.Module, Path]:
    """(the model with a random adapter, the folder that PEFT saved it to)."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(str(folder))
    return wrapped, folder


def lora_layers(model: nn.Module) -> dict[tuple[int, int], Any]:
    """PEFT's LoRA layers by (layer, module index)."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            parts = name.split(".")
            found[int(parts[parts.index("layers") + 1]), LORA_MODULES.index(parts[-1])] = layer
    return found


def check(model: nn.Module, folder: Path, dims: ModelDims) -> None:
    expected = lora_layers(model)
    assert expected
    file = read_adapter(folder, dims, AdapterLimits(256))
    assert set(file.pairs) == set(expected)
    for module in file.spec.modules:
        layer, pair = expected[module.layer, module.module], file.pairs[module.layer, module.module]
        assert module.rank == layer.r["default"]
        assert module.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
        torch.testing.assert_close(pair.b @ pair.a * module.scale, layer.get_delta_weight("default"))
    assert inspect_limits([folder]) == (file.spec.rank, file.spec.module_names)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_peft(name: str, base: Path, tmp_path: Path) -> None:
    model, folder = save(AutoModelForCausalLM.from_pretrained(base), tmp_path, **CONFIGS[name])
    check(model, folder, read_dims(base))


@pytest.mark.filterwarnings("ignore")  # PEFT warns that it does not know the wrapper
@pytest.mark.parametrize("name", ["plain", "all-linear", "rank-pattern", "alpha-pattern", "some-layers"])
def test_saved_by_peft_within_a_wrapper(name: str, base: Path, tmp_path: Path) -> None:
    config = CONFIGS[name]
    if name == "all-linear":  # of a model that transformers does not know, PEFT targets the head too
        config = config | {"exclude_modules": ["lm_head"]}
    model, folder = save(Wrapper(AutoModelForCausalLM.from_pretrained(base)), tmp_path, **config)
    check(model, folder, read_dims(base))


def test_host_pages_hold_peft_s_deltas(base: Path, tmp_path: Path) -> None:
    """From PEFT's file to the bytes that the arena gets: each module's pieces multiply to PEFT's delta."""
    dims = read_dims(base)
    model, folder = save(AutoModelForCausalLM.from_pretrained(base), tmp_path, **CONFIGS["both-rslora"] | {"r": 37})
    tier = HostTier(dims, make_geometry(dims, 4), torch.float32, 1 << 24, slab_bytes=1 << 16)
    adapter = tier.store(1, read_adapter(folder, dims, AdapterLimits(256)))
    blocks: dict[tuple[int, int, int], dict[int, Tensor]] = {}
    for place in adapter.layout.places:
        inputs, outputs = dims.module_shape(LORA_MODULES[place.module])
        shape = (place.ranks, inputs) if place.side == SIDE_A else (outputs, place.ranks)
        flat = adapter.pages[place.chunk].view(torch.float32)[place.offset // 4 :]
        sides = blocks.setdefault((place.layer, place.module, place.rank_block), {})
        sides[place.side] = flat[: shape[0] * shape[1]].view(shape)
    for (layer, module), lora in lora_layers(model).items():
        delta = sum(s[1] @ s[0] for (at, of, _), s in blocks.items() if (at, of) == (layer, module))
        torch.testing.assert_close(delta, lora.get_delta_weight("default"))
    tier.close()

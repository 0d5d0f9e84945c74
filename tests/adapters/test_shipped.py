"""The adapter folders as shipped: well-formed PEFT, small, and measured."""

import json
from pathlib import Path

import data
import pytest
import zoo
from safetensors import safe_open

ADAPTERS = Path(__file__).parents[2] / "adapters"
SIZES = {
    "q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576),
    "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(zoo.SPECS))
def test_adapter_files_are_well_formed(name: str) -> None:
    spec, folder = zoo.SPECS[name], ADAPTERS / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", spec.rank, spec.alpha)
    assert (config["use_rslora"], config["base_model_name_or_path"]) == (spec.use_rslora, zoo.BASE)
    assert sorted(config["target_modules"]) == sorted(spec.modules)
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert len(names) == 2 * 30 * len(spec.modules)
        for tensor in names:
            module, side = tensor.split(".")[-3:-1]
            piece = tensors.get_slice(tensor)
            width, height = SIZES[module]
            expected = [spec.rank, width] if side == "lora_A" else [height, spec.rank]
            assert (piece.get_dtype(), piece.get_shape()) == ("BF16", expected)
            assert tensors.get_tensor(tensor).isfinite().all()
    assert (folder / "README.md").is_file()


def test_adapters_are_varied_and_small() -> None:
    specs = zoo.SPECS.values()
    assert {4, 8, 16, 64} <= {spec.rank for spec in specs}
    assert {2, 7} <= {len(spec.modules) for spec in specs}
    assert any(spec.use_rslora for spec in specs)
    size = sum(path.stat().st_size for path in ADAPTERS.glob("lora*/*"))
    assert size < 25e6


def test_shipped_matrix_holds_the_gates() -> None:
    from evaluate import broken_gates

    report = json.loads((ADAPTERS / "matrix.json").read_text())
    assert report["prompts"] == len(data.held_out_prompts())
    assert set(report["matrix"]) == {"base", *zoo.SPECS}
    assert broken_gates(report["matrix"]) == []

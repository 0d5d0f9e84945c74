"""What is read of good adapters, and the table of bad ones with the reason that each is refused for."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.adapters.peft import inspect_limits, read_adapter
from engine.adapters.spec import AdapterLimits
from engine.models.dims import LORA_MODULES, ModelDims
from engine.types import CONFIG_FILE, TENSORS_FILE, EngineError, ErrorCode
from tests.support.adapters import adapter_tensors, write_adapter

DIMS = ModelDims(layers=3, hidden=24, intermediate=40, heads=3, kv_heads=1, head_dim=8, vocab=97)
LIMITS = AdapterLimits(max_rank=64)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def refusal(folder: Path, dims: ModelDims = DIMS, limits: AdapterLimits = LIMITS) -> str:
    with pytest.raises(EngineError) as caught:
        read_adapter(folder, dims, limits)
    assert caught.value.code is ErrorCode.ADAPTER_INVALID
    assert str(folder) not in caught.value.message
    return caught.value.message


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS_FILE)


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(folder / TENSORS_FILE).items()}
    save_file(tensors, folder / TENSORS_FILE)


# --- good ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranks_scales_and_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    write_adapter(
        tmp_path,
        DIMS,
        rank=5,
        alpha=10,
        rank_pattern={"layers.1.self_attn.q_proj": 16, "up_proj": 3},
        alpha_pattern={r"layers\.(0|1)\.mlp\.up_proj": 12},
        dtype=dtype,
    )
    file = read_adapter(tmp_path, DIMS, LIMITS)
    found = {(m.layer, LORA_MODULES[m.module]): (m.rank, m.scale) for m in file.spec.modules}
    assert len(found) == 21
    assert found[0, "q_proj"] == (5, 2.0)
    assert found[1, "q_proj"] == (16, 10 / 16)
    assert found[0, "up_proj"] == (3, 4.0)
    assert found[2, "up_proj"] == (3, 10 / 3)
    assert file.spec.rank == 16
    assert file.spec.module_names == LORA_MODULES
    stored = load_file(tmp_path / TENSORS_FILE)
    assert torch.equal(file.pairs[0, 0].a, stored[f"{Q0}.lora_A.weight"])
    assert torch.equal(file.pairs[0, 0].b, stored[f"{Q0}.lora_B.weight"])
    assert file.pairs[0, 0].a.dtype is dtype


def test_rslora_scales_by_the_root_of_each_rank(tmp_path: Path) -> None:
    write_adapter(
        tmp_path, DIMS, rank=16, alpha=8, use_rslora=True, rank_pattern={"q_proj": 4}, modules=("q_proj", "v_proj")
    )
    file = read_adapter(tmp_path, DIMS, LIMITS)
    assert {(m.rank, m.scale) for m in file.spec.modules} == {(4, 4.0), (16, 2.0)}


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.layers",
        "base_model.model.layers",
        "base_model.model.language_model.model.layers",
        "base_model.model.model.language_model.layers",
        "model.layers",
        "layers",
        "base_model.model._orig_mod.model.layers",
    ],
)
def test_wrapper_prefixes_bind(tmp_path: Path, prefix: str) -> None:
    write_adapter(tmp_path, DIMS, rank=4, prefix=prefix, modules=("q_proj", "down_proj"))
    assert len(read_adapter(tmp_path, DIMS, LIMITS).pairs) == 6


def test_adapter_names_in_keys_bind(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    renamed(tmp_path, ".weight", ".default.weight")
    assert len(read_adapter(tmp_path, DIMS, LIMITS).pairs) == 21


@pytest.mark.parametrize(
    ("targets", "modules", "layers", "config"),
    [
        ("all-linear", LORA_MODULES, None, {}),
        (r".*\.(q|v)_proj", ("q_proj", "v_proj"), None, {}),
        (r"model\.layers\.[12]\.mlp\.\w+", LORA_MODULES[4:], [1, 2], {"layers_to_transform": None}),
        (["q_proj", "v_proj"], ("q_proj", "v_proj"), [2], {}),
        (["q_proj"], ("q_proj",), [1], {"layers_to_transform": 1, "layers_pattern": "layers"}),
        (
            ["proj", "q_proj"][1:],
            ("q_proj",),
            [0, 2],
            {"layers_to_transform": None, "exclude_modules": ["1.self_attn.q_proj"]},
        ),
        ([f"model.layers.{i}.mlp.up_proj" for i in range(3)], ("up_proj",), None, {}),
        ("all-linear", LORA_MODULES[:4], None, {"exclude_modules": r".*\.mlp\..*"}),
    ],
)
def test_targets(tmp_path: Path, targets: Any, modules: tuple[str, ...], layers: Any, config: dict[str, Any]) -> None:
    write_adapter(tmp_path, DIMS, rank=4, modules=modules, layers=layers, target_modules=targets, **config)
    spec = read_adapter(tmp_path, DIMS, LIMITS).spec
    assert spec.module_names == modules
    assert {m.layer for m in spec.modules} == set(range(3) if layers is None else layers)


HARMLESS: dict[str, Any] = {
    "base_model_name_or_path": "owner/model",
    "revision": "main",
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "auto_mapping": {"base_model_class": "X"},
    "peft_version": "0.21.2",
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "ensure_weight_tying": False,
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "loftq_config": {"loftq_bits": 4},
    "init_lora_weights": "gaussian",
    "some_future_flag": False,
    "some_future_setting": None,
    "modules_to_save": [],
    "layer_replication": None,
}


def test_settings_that_change_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=4, **HARMLESS)
    assert read_adapter(tmp_path, DIMS, LIMITS).spec.rank == 4


@pytest.mark.parametrize("scheme", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "MiCA"])
def test_inits_that_leave_the_base_alone(tmp_path: Path, scheme: Any) -> None:
    write_adapter(tmp_path, DIMS, rank=4, init_lora_weights=scheme)
    assert read_adapter(tmp_path, DIMS, LIMITS).spec.rank == 4


def test_content_hash_tells_every_change(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "config", "weights")]
    for folder in folders:
        write_adapter(folder, DIMS, rank=4)
    edit_config(folders[2], lora_alpha=17)
    edit_tensors(folders[3], lambda tensors: tensors[f"{Q0}.lora_A.weight"][0, 0].add_(1e-6))
    hashes = [read_adapter(folder, DIMS, LIMITS).spec.content_hash for folder in folders]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_adapter_outlives_its_files(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", DIMS, rank=4)
    expected = load_file(tmp_path / "a" / TENSORS_FILE)[f"{Q0}.lora_A.weight"].clone()
    file = read_adapter(tmp_path / "a", DIMS, LIMITS)
    (tmp_path / "a" / TENSORS_FILE).write_bytes(b"")
    shutil.rmtree(tmp_path / "a")
    assert torch.equal(file.pairs[0, 0].a, expected)


# --- limits


def test_limits_are_inferred_from_headers(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", DIMS, rank=4, modules=("v_proj", "q_proj"))
    write_adapter(tmp_path / "b", DIMS, rank=8, rank_pattern={"down_proj": 33}, modules=("down_proj", "up_proj"))
    assert inspect_limits([tmp_path / "a"]) == (4, ("q_proj", "v_proj"))
    assert inspect_limits([tmp_path / "a", tmp_path / "b"]) == (33, ("q_proj", "v_proj", "up_proj", "down_proj"))
    with pytest.raises(EngineError, match=r"the adapter has no adapter_config\.json"):
        inspect_limits([tmp_path / "nowhere"])


def test_limits_refuse(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=16, rank_pattern={"layers.2.mlp.up_proj": 17})
    assert "layers.2.mlp.up_proj has rank 17; this server takes at most 16 (--max-lora-rank)" in refusal(
        tmp_path, limits=AdapterLimits(16)
    )
    assert "down_proj is among the adapter's modules; this server takes q_proj" in refusal(
        tmp_path, limits=AdapterLimits(64, LORA_MODULES[:6])
    )
    assert read_adapter(tmp_path, DIMS, AdapterLimits(17)).spec.rank == 17


# --- bad configs

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', the only type of adapter that is supported (found \"LOHA\")"),
    ({"peft_type": "IA3"}, "peft_type: expected 'LORA'"),
    ({"peft_type": "PROMPT_TUNING"}, "peft_type: expected 'LORA'"),
    ({"peft_type": None}, "peft_type: expected 'LORA'"),
    ({"use_dora": True}, "use_dora: DoRA is not supported (found true)"),
    ({"bias": "all"}, "bias: expected 'none', biases are not supported (found \"all\")"),
    ({"bias": "lora_only"}, "bias: expected 'none'"),
    ({"lora_bias": True}, "lora_bias: biases are not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: modules trained whole are not supported"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: new or retrained tokens are not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: transposed"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: replicated layers are not supported"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters: LoRA on bare parameters"),
    ({"megatron_config": {"x": 1}}, "megatron_config: Megatron"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: activated LoRA"),
    ({"use_qalora": True}, "use_qalora: QALoRA is not supported"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: block-diagonal"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config: Arrow"),
    ({"kasa_config": {"beta": 1}}, "kasa_config: KaSA changes"),
    ({"some_future_setting": 3}, "some_future_setting: this server does not know the setting"),
    ({"some_future_flag": True}, "some_future_flag: this server does not know the setting"),
    ({"some_future_number": 0}, "some_future_number: this server does not know the setting"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: such training starts from a changed base model"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "olora"}, 'found "olora"'),
    ({"init_lora_weights": "corda"}, 'found "corda"'),
    ({"init_lora_weights": "loftq"}, 'found "loftq"'),
    ({"init_lora_weights": "lora_ga"}, 'found "lora_ga"'),
    ({"init_lora_weights": 1}, "init_lora_weights"),
    ({"r": 0}, "r: expected a whole number of at least 1 (found 0)"),
    ({"r": 2.5}, "r: expected a whole number of at least 1 (found 2.5)"),
    ({"r": "8"}, "r: expected a whole number"),
    ({"r": True}, "r: expected a whole number"),
    ({"r": None}, "r: expected a whole number"),
    ({"lora_alpha": None}, "lora_alpha: expected a finite number (found null)"),
    ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
    ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected an object"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected a whole number"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: the pattern '(' is no regular expression"),
    ({"rank_pattern": {f"m{i}": 4 for i in range(3000)}}, "rank_pattern: at most 2048 patterns are read, found 3000"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: expected a finite number"),
    ({"target_modules": None}, "target_modules: expected names of modules"),
    ({"target_modules": []}, "target_modules: expected names of modules"),
    ({"target_modules": 5}, "target_modules: expected a list of names or a pattern"),
    ({"target_modules": ["q_proj", 5]}, "target_modules: expected a list of names or a pattern"),
    ({"target_modules": "(q_proj"}, "target_modules: the pattern '(q_proj' is no regular expression"),
    ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: 'lm_head' names no module that can be adapted here"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules: 'embed_tokens' names no module"),
    ({"target_modules": ["q_proj", "qkv_proj"]}, "target_modules: 'qkv_proj' names no module"),
    (
        {"target_modules": ["q_proj"]},
        "has tensors for model.layers.0.self_attn.k_proj, which adapter_config.json does not",
    ),
    ({"target_modules": ".*attn.*"}, "has tensors for model.layers.0.mlp.gate_proj, which"),
    ({"exclude_modules": ["v_proj"]}, "has tensors for model.layers.0.self_attn.v_proj, which"),
    ({"layers_to_transform": [0, 1]}, "has tensors for model.layers.2.self_attn.q_proj, which"),
    ({"layers_to_transform": [0, 1, 2, 7]}, "the adapter is for layer 7, this base model has layers 0 to 2"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform: expected layer numbers"),
    ({"layers_to_transform": [-1]}, "layers_to_transform: expected layer numbers"),
    ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern: expected 'layers'"),
    (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "layers_to_transform: PEFT takes it only together with",
    ),
    ({"r": 8}, f"{Q0}.lora_A.weight has shape [4, 24], expected [8, 24]: adapter_config.json gives it rank 8"),
    ({"rank_pattern": {"v_proj": 2}}, "v_proj.lora_A.weight has shape [4, 24], expected [2, 24]"),
]


@pytest.mark.parametrize(
    ("changes", "reason"), CONFIGS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    assert reason in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "adapter_config.json is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "expected an object, found [1]"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b" " * (1 << 20) + b"{}", "adapter_config.json has 1,048,578 bytes; at most 1,048,576 are read"),
    ],
)
def test_broken_config_files(tmp_path: Path, data: bytes, reason: str) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    (tmp_path / CONFIG_FILE).write_bytes(data)
    assert reason in refusal(tmp_path)


# --- bad tensors


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].__setitem__((-1, -1), value)


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
TENSORS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (drop(A), f"{B} has no lora_A beside its lora_B"),
    (drop(B), f"{A} has no lora_B beside its lora_A"),
    (lambda tensors: (tensors.pop(A), tensors.pop(B)), "targets model.layers.0.self_attn.q_proj, but adapter_model"),
    (lambda tensors: tensors.clear(), "holds no tensors"),
    (spoil(A, float("nan")), f"{A} holds NaN or infinite values"),
    (spoil(B, float("inf")), f"{B} holds NaN or infinite values"),
    (spoil(B, float("-inf")), f"{B} holds NaN or infinite values"),
    (
        put(A, torch.zeros(4, 48)),
        f"{A} has shape [4, 48], expected [4, 24]: the adapter was trained for a base model of",
    ),
    (
        put(B, torch.zeros(32, 4)),
        f"{B} has shape [32, 4], expected [24, 4]: the adapter was trained for a base model of",
    ),
    (put(A, torch.zeros(24, 4)), f"{A} has shape [24, 4], expected [4, 24]"),
    (put(A, torch.zeros(4, 24, 1)), f"{A} has shape [4, 24, 1], expected [4, 24]"),
    (put(A, torch.tensor(1.0)), f"{A} has shape [], expected [4, 24]"),
    (put(A, torch.zeros(0, 24)), f"{A} has shape [0, 24], expected [4, 24]"),
    (put(A, torch.zeros(4, 24, dtype=torch.int8)), f"{A} has dtype I8; expected F32, F16, BF16"),
    (put(A, torch.zeros(4, 24, dtype=torch.float8_e4m3fn)), f"{A} has dtype F8_E4M3; expected F32, F16, BF16"),
    (put("stray", torch.zeros(1)), "tensor stray binds to no module of this model (supported: lora_A and lora_B of q_"),
    (
        put("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 24)),
        "adapters on the embedding or the output head are not supported",
    ),
    (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 97)), "on the embedding or the output"),
    (put("base_model.model.model.embed_tokens.weight", torch.zeros(97, 24)), "on the embedding or the output head"),
    (put(f"{Q0}.lora_magnitude_vector.weight", torch.zeros(24)), "DoRA is not supported"),
    (put(f"{Q0}.lora_B.bias", torch.zeros(24)), "biases are not supported"),
    (put(f"{Q0}.base_layer.bias", torch.zeros(24)), "biases are not supported"),
    (
        put("base_model.model.score.modules_to_save.weight", torch.zeros(2, 24)),
        "modules trained whole are not supported",
    ),
    (put("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", torch.zeros(4, 24)), "merged projections"),
    (
        put("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight", torch.zeros(4, 24)),
        "experts are not supported",
    ),
    (
        put("base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 24)),
        "binds to no",
    ),
    (
        put("other.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 24)),
        "tensors of different models or adapters",
    ),
    (put(f"{Q0}.lora_A.second.weight", torch.zeros(4, 24)), "tensors of different models or adapters"),
]


@pytest.mark.parametrize(("change", "reason"), TENSORS)
def test_bad_tensors(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], reason: str) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    edit_tensors(tmp_path, change)
    message = refusal(tmp_path)
    assert reason in message
    assert len(message) < 400


def test_another_base_model(tmp_path: Path) -> None:
    deeper = ModelDims(**{name: getattr(DIMS, name) for name in DIMS.__slots__} | {"layers": 5})
    wider = ModelDims(**{name: getattr(DIMS, name) for name in DIMS.__slots__} | {"hidden": 32})
    write_adapter(tmp_path / "deeper", deeper, rank=4)
    write_adapter(tmp_path / "wider", wider, rank=4)
    assert "the adapter is for layer 4, this base model has layers 0 to 2" in refusal(tmp_path / "deeper")
    assert "has shape [4, 32], expected [4, 24]: the adapter was trained for a base" in refusal(tmp_path / "wider")
    write_adapter(tmp_path / "shallow", DIMS, rank=4)
    assert "targets model.layers.3.self_attn.q_proj, but" in refusal(tmp_path / "shallow", deeper)


def test_a_file_of_the_vision_tower_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=4, prefix="base_model.model.vision_model.encoder.layers")
    assert "binds to no module of this model" in refusal(tmp_path)


# --- broken tensor files


def header(entries: Any, body: bytes = b"", length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BROKEN: list[tuple[bytes, str]] = [
    (b"", "is truncated or no safetensors file (0 bytes)"),
    (b"abc", "is truncated or no safetensors file (3 bytes)"),
    (b"\xff" * 64, "is truncated or no safetensors file"),
    (header({}, length=10**6), "is truncated or no safetensors file"),
    (header(b" " * ((16 << 20) + 1)), "has a header of 16,777,217 bytes; at most 16,777,216 are read"),
    (header(b"{nonsense"), "its header is not valid JSON"),
    (header(b"[" * 50_000), "its header is not valid JSON"),
    (header([1]), "its header is no object"),
    (header({"x": 1}), "has a header that makes no sense at 'x'"),
    (header({"x": entry([2], 0, 8)}), "is truncated: its tensors take 8 bytes, 0 are there"),
    (header({"x": entry([2], 0, 8)}, b"1234567"), "is truncated: its tensors take 8 bytes, 7 are there"),
    (header({"x": entry([2], 0, 8)}, b"123456789"), "has 1 bytes behind its last tensor"),
    (header({"x": entry([2], 0, 4)}, b"1234"), "makes no sense at 'x'"),
    (header({"x": entry([2], 8, 0)}, b"12345678"), "makes no sense at 'x'"),
    (header({"x": entry([-2], 0, 8)}, b"12345678"), "makes no sense at 'x'"),
    (header({"x": entry([10**30], 0, 8)}, b"12345678"), "makes no sense at 'x'"),
    (header({"x": entry(["2"], 0, 8)}, b"12345678"), "makes no sense at 'x'"),
    (header({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, b"x" * 12), "has a gap or an overlap before y"),
    (header({"x": entry([2], 4, 12)}, b"x" * 12), "has a gap or an overlap before x"),
    (pickle.dumps({"a": 1}), "no safetensors file"),
]


@pytest.mark.parametrize(("data", "reason"), BROKEN)
def test_broken_tensor_files(tmp_path: Path, data: bytes, reason: str) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    (tmp_path / TENSORS_FILE).write_bytes(data)
    assert reason in refusal(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=2, modules=("q_proj",))
    data = (tmp_path / TENSORS_FILE).read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / TENSORS_FILE).write_bytes(data[:length])
        assert "truncated" in refusal(tmp_path)


def test_tensors_of_mixed_dtypes_at_odd_offsets(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=3, modules=("q_proj",), layers=[0])
    tensors = adapter_tensors(DIMS, rank=3, modules=("q_proj",), layers=[0])
    a, b = tensors[A].to(torch.bfloat16)[:, :24], tensors[B]
    parts = [a.contiguous().view(torch.uint8).numpy().tobytes(), b.numpy().tobytes()]
    odd = {"dtype": "BF16", "shape": [3, 24], "data_offsets": [0, 144]}
    (tmp_path / TENSORS_FILE).write_bytes(header({A: odd, B: entry([24, 3], 144, 432)}, b"".join(parts)))
    pair = read_adapter(tmp_path, DIMS, LIMITS).pairs[0, 0]
    assert torch.equal(pair.a, a)
    assert torch.equal(pair.b, b)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    (tmp_path / TENSORS_FILE).rename(tmp_path / "adapter_model.bin")
    assert "only adapter_model.bin, a pickle, which is never opened" in refusal(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    write_adapter(tmp_path, DIMS, rank=4)
    (tmp_path / TENSORS_FILE).unlink()
    assert "the adapter has no adapter_model.safetensors" in refusal(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    assert "the adapter has no adapter_config.json" in refusal(tmp_path)

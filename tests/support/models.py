"""Tiny random decoder checkpoints with a tokenizer and a chat template, in the form of a Hugging Face folder."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.models.dims import LORA_MODULES, ModelDims

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_TOKEN, EOS_TOKEN = 1, 2
IMPOSSIBLE_BYTES = {0xC0, 0xC1, *range(0xF5, 0x100)}  # never in UTF-8, so 256 ids hold every byte and three specials
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_model(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    vocab: int = 256,
    seed: int = 0,
    add_bos: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write config, weights and tokenizer; further keywords go into config.json. Returns the folder.

    `vocab` is at least 246 (bytes and special tokens); ids beyond some 3,000 have no token. `add_bos`: the tokenizer
    puts `<|im_start|>` before what it encodes with special tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dims = ModelDims(layers, hidden, intermediate, heads, kv_heads, head_dim, vocab)
    settings = _config(dims, dtype, config)
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_TOKEN, "eos_token_id": EOS_TOKEN})
    save_file(_weights(dims, settings, seed, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(vocab, add_bos=add_bos).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    return folder


def read_dims(folder: Path) -> ModelDims:
    """The shape of a checkpoint that `write_model` wrote."""
    raw = json.loads((folder / "config.json").read_text())
    return ModelDims(
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        intermediate=raw["intermediate_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        vocab=raw["vocab_size"],
    )


def build_tokenizer(vocab: int = 256, *, add_bos: bool = False) -> Tokenizer:
    """Byte-level BPE: special tokens, every byte of UTF-8, then merges of letter pairs up to `vocab` ids."""
    tokens, merges = _vocabulary(vocab)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if add_bos:
        bos = SPECIAL_TOKENS[BOS_TOKEN]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, BOS_TOKEN)]
        )
    return tokenizer


def _vocabulary(vocab: int) -> tuple[list[str], list[tuple[str, str]]]:
    tokens = [*SPECIAL_TOKENS, *_byte_characters()]
    if vocab < len(tokens):
        raise ValueError(f"vocab {vocab}: bytes and special tokens alone take {len(tokens)} ids")
    letters = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ"
    pairs = [("Ġ", letter) for letter in letters] + [(a, b) for a in letters for b in letters]
    merges = pairs[: vocab - len(tokens)]
    return tokens + [a + b for a, b in merges], merges


def _byte_characters() -> list[str]:
    """The characters that stand for bytes in a byte-level vocabulary, in the bytes' order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256) if byte not in IMPOSSIBLE_BYTES]


def _config(dims: ModelDims, dtype: torch.dtype, config: dict[str, Any]) -> dict[str, Any]:
    model_type = config.get("model_type", "llama")
    return {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.intermediate,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_TOKEN,
        "eos_token_id": EOS_TOKEN,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **config,
    }


def _weights(dims: ModelDims, settings: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near unit size, so that logits are a few units apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    weights = {
        "model.embed_tokens.weight": normal(dims.vocab, dims.hidden),
        "model.norm.weight": normal(dims.hidden, std=0.1, mean=1.0),
    }
    if not settings["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(dims.vocab, dims.hidden, std=3 / math.sqrt(dims.hidden))
    for layer in range(dims.layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = normal(dims.hidden, std=0.1, mean=1.0)
        for module in LORA_MODULES:
            inputs, outputs = dims.module_shape(module)
            weights[f"{prefix}{module_path(module)}.weight"] = normal(outputs, inputs, std=1 / math.sqrt(inputs))
        for name, size in _extras(dims, settings):
            mean = 1.0 if "norm" in name else 0.0
            weights[f"{prefix}self_attn.{name}"] = normal(size, std=0.1, mean=mean)
    return weights


def _extras(dims: ModelDims, settings: dict[str, Any]) -> list[tuple[str, int]]:
    """Names and sizes of a family's attention biases and head norms."""
    model_type = settings["model_type"]
    biased = ["q_proj", "k_proj", "v_proj"] if model_type == "qwen2" else []
    if settings.get("attention_bias"):
        biased = ["q_proj", "k_proj", "v_proj", "o_proj"]
    extras = [(f"{module}.bias", dims.module_shape(module)[1]) for module in biased]
    if model_type == "qwen3":
        extras += [("q_norm.weight", dims.head_dim), ("k_norm.weight", dims.head_dim)]
    return extras


def module_path(module: str) -> str:
    """`q_proj` -> `self_attn.q_proj`, as a decoder layer names it."""
    return f"{'self_attn' if module in LORA_MODULES[:4] else 'mlp'}.{module}"


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_TOKEN],
        "eos_token": SPECIAL_TOKENS[EOS_TOKEN],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))

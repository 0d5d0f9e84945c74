"""Turns a Llama GGUF into a Hugging Face folder: config, bf16 safetensors, tokenizer with chat template.

Called by the demo model's fetch. Uses numpy, gguf and tokenizers, never torch, so that it starts quickly.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

CONTROL_TOKEN = 3  # GGUF token type of tokens that text never spells
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Fields = dict[str, Any]


def convert(gguf: Path, target: Path, *, progress: bool = True) -> None:
    """Write the whole folder; `target` exists and is empty."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", _generation_config(fields))
    _write_tokenizer(fields, target)
    bars = tqdm(reader.tensors, desc="converting to bf16", unit="tensor", disable=not progress)
    _write_weights(_tensors(bars, fields), target / "model.safetensors")


def model_config(fields: Fields, *, tied: bool) -> dict[str, Any]:
    """The LlamaConfig of the file, in the spelling of transformers 5 with the older rope field beside it."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    theta = float(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF holds it as float32; the checkpoint says 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        **_generation_config(fields),
    }


def _generation_config(fields: Fields) -> dict[str, int]:
    """The special token ids that both config files name."""
    sources = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: int(fields[f"tokenizer.ggml.{theirs}_token_id"]) for ours, theirs in sources.items()}


def tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    match parts:
        case [top]:
            return f"{TOP_NAMES[top]}.weight"
        case ["blk", layer, module]:
            return f"model.layers.{layer}.{LAYER_NAMES[module]}.weight"
        case _:
            raise ValueError(f"unknown GGUF tensor {name!r}")


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's interleaving of each head's rows for rotary pairs; `weight` is [heads * head_dim, in]."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; weights are finite, so NaN needs no care."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    bias = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + bias) >> np.uint32(16)).astype(np.uint16)


def _tensors(tensors: Any, fields: Fields) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Each tensor under its Hugging Face name, dequantised."""
    from gguf.quants import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        module = tensor.name.split(".")[-2]
        if module in heads:
            weight = unpermute(weight, heads[module])
        yield tensor_name(tensor.name), to_bf16(weight)


def _write_weights(tensors: Iterator[tuple[str, NDArray[np.uint16]]], path: Path) -> None:
    """One safetensors file, by hand: numpy has no bf16, and the library's raw interface differs between versions."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    arrays, end = [], 0
    for name, bits in tensors:
        begin, end = end, end + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [begin, end]}
        arrays.append(bits)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for bits in arrays:
            file.write(bits.astype("<u2", copy=False).data)


def _write_tokenizer(fields: Fields, target: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    if (kind := fields["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"the converter knows the pre-tokenizer 'smollm', not {kind!r}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    _build_tokenizer(tokens, fields["tokenizer.ggml.merges"], _control_tokens(fields)).save(
        str(target / "tokenizer.json")
    )
    special = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["llama.context_length"],
            "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
            **special,
        },
    )
    (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _control_tokens(fields: Fields) -> list[str]:
    """The special tokens, in the order of their ids."""
    pairs = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return [token for token, kind in pairs if kind == CONTROL_TOKEN]


def _build_tokenizer(tokens: list[str], merges: list[str], control: list[str]) -> Any:
    """SmolLM's byte-level BPE, which splits digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""The bases that benchmarks run: Llama-3.1-8B's shape, or a tiny one for the short form; weights are made at start.

Every id has a token of its own that is text, so that a server's stream has an event for each.
"""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from string import ascii_letters
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128009,
    "bos_token_id": 128000,
}  # fmt: skip
TINY: Mapping[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rope_scaling": None,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """A checkpoint without weights, for --load-format dummy; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    make_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder


def make_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE: every byte, then words of two letters and of three, up to `vocab` ids."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*product(ascii_letters, ascii_letters)]
    merges += [(a + b, c) for a, b, c in product(ascii_letters, ascii_letters, ascii_letters)]
    merges = merges[: max(0, vocab - len(tokens))]
    ids = {token: i for i, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

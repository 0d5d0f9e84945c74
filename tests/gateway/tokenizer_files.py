"""Tokenizers for the gateway's tests, made in memory or written as a model's folder: no weights, no torch."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġwo r", "Ġwor l", "Ġworl d", "Ġ t", "Ġt h", "Ġth e")


def byte_level(*, add_bos: bool = False, specials: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """GPT-2's kind: ids 0.. are special tokens, then all 256 bytes, then a few merges."""
    pairs = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[1]} $A", pair=None, special_tokens=[(specials[1], 1)]
        )
    return tokenizer


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """Llama-2's kind: words with U+2581 for a space, and a token for each byte that no word covers."""
    words = ["▁", "▁hello", "▁world", "hello", "world", "▁the", "a", "b", "é", "你", "▁▁", "!", "�"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    specials = [AddedToken(name, special=True, normalized=False) for name in names[:3]]
    tokenizer.add_special_tokens(specials)
    return tokenizer


def metaspace() -> Tokenizer:
    """The decoder that drops the first word's space by itself."""
    words = ["<unk>", "▁", "▁hello", "▁world", "hello", "wor", "ld", "▁▁", "é", "!", "a"]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def write_folder(
    folder: Path, tokenizer: Tokenizer | None = None, template: str | None = CHATML, **config: Any
) -> Path:
    """A model's folder as far as the gateway reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[1], "eos_token": {"content": SPECIAL[0]}, "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder

"""A model's tokenizer as the gateway needs it: text to ids, and each id's bytes for the detokenizer.

Reads tokenizer.json and tokenizer_config.json alone; transformers is never imported.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as RawTokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The tokenizer's files are missing or cannot be read."""


class Tokenizer:
    """Immutable after `load`; its methods may be called from any thread."""

    def __init__(self, raw: RawTokenizer, config: dict[str, Any]) -> None:
        raw.no_truncation()
        raw.no_padding()
        self.config = config
        self.special_tokens = dict(_special_tokens(config))  # bos_token and so on, by name
        self._raw = raw
        self._special_ids = frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special)
        self._decoder = _decoder_types(raw.decoder)
        self._byte_level = _byte_level_table() if "ByteLevel" in self._decoder else None
        self._anchor = self._find_anchor() if self._byte_level is None else 0
        self._bytes: dict[int, bytes] = {}
        self._bos_id = self._missing_bos()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads a model's folder.

        Raises:
            TokenizerError: tokenizer.json is missing or broken.
        """
        path = folder / "tokenizer.json"
        try:
            raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for every cause
            raise TokenizerError(f"cannot read {path}: {error}") from error
        return cls(raw, _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens that stand in the text are recognised either way.

        The batch call, of one text, lets other threads run, which `tokenizers` does not do for the plain one.
        """
        ids: list[int] = self._raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return self._begin(ids) + ids if add_special_tokens else ids

    def offsets(self, text: str) -> list[int]:
        """Where in `text` each token of `encode(text, add_special_tokens=True)` begins, in characters."""
        encoding = self._raw.encode_batch([text], add_special_tokens=True)[0]
        return [0] * len(self._begin(encoding.ids)) + [start for start, _ in encoding.offsets]

    def _begin(self, ids: list[int]) -> list[int]:
        return [] if self._bos_id is None or ids[:1] == [self._bos_id] else [self._bos_id]

    def is_special(self, token: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out of the text."""
        return token in self._special_ids

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that `token` adds behind other text; one token may hold a part of a character only."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._compute_bytes(token)
        return known

    def first_bytes(self, token: int) -> bytes:
        """`token_bytes` at the very start of a text, where some decoders drop a space."""
        if self._byte_level is not None or (self._byte_token(token) or b"") >= b"\x80":
            return self.token_bytes(token)
        return self._raw.decode([token], skip_special_tokens=False).encode()

    def _compute_bytes(self, token: int) -> bytes:
        text = self._raw.id_to_token(token)
        if text is None:  # ids that only pad the embedding
            return b""
        if self._byte_level is not None:
            return _byte_level_bytes(text, self._byte_level)
        return self._byte_token(token) or self._behind_anchor(token)

    def _behind_anchor(self, token: int) -> bytes:
        before = self._raw.decode([self._anchor], skip_special_tokens=False)
        both = self._raw.decode([self._anchor, token], skip_special_tokens=False)
        return both.removeprefix(before).encode()

    def _byte_token(self, token: int) -> bytes | None:
        if "ByteFallback" not in self._decoder:
            return None
        match = BYTE_TOKEN.fullmatch(self._raw.id_to_token(token) or "")
        return bytes([int(match[1], 16)]) if match else None

    def _find_anchor(self) -> int:
        """A token of plain letters, whose text does not depend on what follows."""
        vocabulary: dict[str, int] = self._raw.get_vocab(with_added_tokens=False)
        letters = (token for text, token in vocabulary.items() if text.isascii() and text.isalpha())
        return min(letters, default=0)

    def _missing_bos(self) -> int | None:
        """The begin token's id where the configuration asks for it and tokenizer.json forgets it."""
        bos = self.special_tokens.get("bos_token")
        if not self.config.get("add_bos_token") or bos is None:
            return None
        token: int | None = self._raw.token_to_id(bos)
        return None if token is None or token in self._raw.encode("", add_special_tokens=True).ids else token


def _read(path: Path) -> dict[str, Any]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}


def _special_tokens(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in SPECIAL_TOKEN_NAMES:
        match config.get(name):
            case str(text) | {"content": str(text)}:
                yield name, text


def _decoder_types(decoder: Any) -> frozenset[str]:
    """The names of all parts of a `tokenizers` decoder, which shows them only in its pickled state, as JSON."""
    return frozenset() if decoder is None else frozenset(_type_names(json.loads(decoder.__getstate__())))


def _type_names(spec: dict[str, Any]) -> Iterator[str]:
    yield spec["type"]
    for part in spec.get("decoders", []):
        yield from _type_names(part)


def _byte_level_table() -> dict[str, int]:
    """The bytes that byte-level BPE's characters stand for: printable ones themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(text: str, table: dict[str, int]) -> bytes:
    """A token's bytes; one with a character outside the table (an added token) stands for itself."""
    try:
        return bytes(table[character] for character in text)
    except KeyError:
        return text.encode()

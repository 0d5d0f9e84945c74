"""The tokenizer's files for the gateway, which reads `tokenizer.json` alone and has no transformers to make one."""

import hashlib
import os
import tempfile
from pathlib import Path

from engine.models.demo import default_cache_dir
from engine.models.source import ModelSourceError


def tokenizer_folder(folder: Path) -> Path:
    """The checkpoint's own folder where it has a tokenizer.json, else a cached one converted from its other files.

    Raises:
        ModelSourceError: the checkpoint has no tokenizer that transformers can convert.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    converted = default_cache_dir() / "tokenizers" / key
    if not (converted / "tokenizer.json").is_file():
        _convert(folder, converted)
    return converted


def _convert(folder: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / "tokenizer"
        try:
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(made)
        except Exception as error:  # transformers raises whatever its converters meet
            raise ModelSourceError(f"{folder.name}: no tokenizer.json, and none could be made ({error})") from error
        if not (made / "tokenizer.json").is_file():
            raise ModelSourceError(f"{folder.name}: its tokenizer has no fast form; a tokenizer.json is needed")
        if not target.exists():
            os.replace(made, target)

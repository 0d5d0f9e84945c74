"""What a checkpoint's generation_config.json asks for where a request names nothing: the gateway's model defaults."""

from pathlib import Path

from engine.models.config import read_json

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(folder: Path) -> dict[str, float | int | None]:
    """The sampling fields that the file names; empty where there is no such file."""
    raw = read_json(folder / "generation_config.json")
    return {name: raw[name] for name in SAMPLING_FIELDS if raw.get(name) is not None}

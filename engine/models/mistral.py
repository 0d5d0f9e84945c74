"""The Mistral family's flags: Llama with a sliding window in all layers where the config asks for one."""

from dataclasses import replace

from engine.models.config import Json, ModelConfig


def mistral(raw: Json, config: ModelConfig) -> ModelConfig:
    window = raw.get("sliding_window")
    if window is None:
        return config
    return replace(config, sliding_window=int(window), sliding_layers=(True,) * config.dims.layers)

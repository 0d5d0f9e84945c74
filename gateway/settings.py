"""What the command line's flags become: the engine's settings and the gateway's own. Immutable; holds the secrets."""

from typing import Literal

import msgspec

from engine.config import EngineConfig

MAX_BODY_BYTES = 4 * 2**20
MAX_LORA_UPLOAD_BYTES = 2 * 2**30


class SettingsError(ValueError):
    """A flag's value, or a combination of flags, that cannot be served; the message names the flag."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `loramux serve` needs. `repr` never shows the keys."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 30000  # 0: any free one
    api_key: str | None = None  # wanted by every route but /health, /metrics and the page's files
    admin_api_key: str | None = None  # wanted by the routes that change the server; None: loopback peers only
    chat_template: str | None = None  # a file or the template itself; None: the model's own
    sampling_defaults: Literal["model", "openai"] = "model"  # where omitted sampling fields come from
    stream_interval: int = 1  # tokens of a choice between two events
    max_body_bytes: int = MAX_BODY_BYTES
    lora_dir: str | None = None  # adapters in it are served by their folders' names
    lora_hub_allow: tuple[str, ...] = ()  # patterns of hub repositories that are served by their ids
    lora_preload: tuple[str, ...] = ()  # names that are read to the host before the server is ready
    lora_warm: tuple[str, ...] = ()  # names that are in the arena when the server is ready
    lora_state: str | None = None  # file that keeps what was loaded over the API
    lora_spool_dir: str | None = None  # folder of uploads; None: `spool` in the cache
    max_lora_upload_bytes: int = MAX_LORA_UPLOAD_BYTES
    shutdown_timeout: float = 10.0  # seconds that open answers get when the server stops
    log_level: str = "info"

    def __repr__(self) -> str:
        return f"Settings(host={self.host!r}, port={self.port}, engine={self.engine!r})"

"""Values that gateway and engine both speak of. Imports no torch; every struct crosses the link as msgpack."""

import enum

import msgspec

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE)  # of an adapter in PEFT's format, wherever it comes from
HUB_PREFIX = "hub:"  # before a source that is a repository, whatever folder may bear its name


class FinishReason(enum.StrEnum):
    """Why a sequence ended. `stop` covers end tokens and stop token ids; stop strings are the gateway's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class AdapterState(enum.StrEnum):
    """Where an adapter is in its life; see docs/architecture.md."""

    COLD = "cold"  # known, its bytes are only at its source
    LOADING = "loading"  # on its way from the source to the host
    HOST = "host"  # its pages are in host memory
    RESIDENT = "resident"  # its pieces are in the arena
    DRAINING = "draining"  # unloading: accepted requests end, new ones are refused
    FAILED = "failed"  # the last load failed; `error` says why


class ErrorCode(enum.StrEnum):
    """The engine's typed refusals; gateway/errors.py maps each to a status, a type and a code."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    ADAPTER_NOT_FOUND = "adapter_not_found"  # unknown, unloaded or stale adapter_id
    ADAPTER_EXISTS = "adapter_exists"
    ADAPTER_INVALID = "adapter_invalid"  # bad files, unsupported features, beyond the server's limits
    ADAPTER_UNAVAILABLE = "adapter_unavailable"  # a load failed or a drain timed out
    LORA_DISABLED = "lora_disabled"
    QUEUE_FULL = "queue_full"
    ENGINE_DEAD = "engine_dead"
    INTERNAL = "internal"


class EngineError(Exception):
    """A refusal or failure with its reason, raised by the engine and by its client alike."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled, already validated and with every default filled in."""

    max_tokens: int  # 0: only the prompt is computed (for its log-probabilities)
    seed: int  # 63 bits; the gateway draws one where the client gave none
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives a token; 0: the chosen token's alone; None: none
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; such a request bypasses the prefix cache


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token under the model itself: before temperature, penalties and bias."""

    token: int
    logprob: float
    rank: int  # 1 is the most likely
    top: list[tuple[int, float]]  # the most likely tokens, best first


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the outside may know of an adapter."""

    name: str
    adapter_id: int  # fresh for each load, never used again
    source: str  # as the caller gave it
    revision: str | None = None  # of a hub source
    state: AdapterState
    pinned: bool = False
    weight: float = 1.0  # of its share, where --schedule-policy is fair
    rank: int = 0  # 0 while unknown (cold)
    modules: tuple[str, ...] = ()
    bytes: int = 0  # in the arena, when resident
    requests: int = 0  # running and waiting sequences
    created: float = 0.0  # unix seconds
    last_used: float = 0.0  # unix seconds, 0 if never
    error: str | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The served base and the engine's sizes, told to the gateway once the engine is ready."""

    served_name: str
    model_path: str  # as the user gave it
    folder: str  # local folder with the tokenizer's files (tokenizer.json made by the engine where it was missing)
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]  # union of config.json and generation_config.json
    bos_token_id: int | None
    generation_defaults: dict[str, float | int | None]  # temperature, top_p, top_k, ... that generation_config names
    dtype: str
    device: str
    block_tokens: int
    chunk_bytes: int
    num_chunks: int
    enable_lora: bool
    max_loras_per_batch: int
    max_loaded_loras: int | None
    max_lora_rank: int
    lora_target_modules: tuple[str, ...]
    lora_backend: str
    parameters: int = 0
    created: int = 0  # unix seconds

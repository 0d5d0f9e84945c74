"""The whole vocabulary between gateway and engine. One struct a message, tagged by its name, msgpack on the wire.

The gateway sends a `Command`, the engine sends an `Event`; both sides match on the type with `assert_never`.
"""

import msgspec

from engine.types import AdapterInfo, AdapterState, ErrorCode, FinishReason, ModelInfo, SamplingParams, TokenLogprob


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One prompt with `n` choices. A rejected one is answered by `RequestFailed`."""

    request_id: int  # unique in the gateway's life
    prompt: list[int]  # at least one token
    n: int = 1  # choice i samples with (params.seed, i)
    adapter_id: int | None = None  # None: the base
    params: SamplingParams
    salt: str | None = None  # keeps prefix blocks apart from other salts'
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ends a request, or one choice of it (a stop string was found, the client went away). Unknown ids are ignored."""

    request_id: int
    choice: int | None = None


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by `CallResult` when the adapter is on the host (pinned: in the arena).

    With `inplace` a name that is loaded gets these weights; what it does not tell of pin and weight stays as it is.
    """

    call_id: int
    name: str
    source: str
    pinned: bool | None = None  # None: no, or as it was
    revision: str | None = None
    weight: float | None = None  # of its share, where --schedule-policy is fair; None: 1, or as it was
    inplace: bool = False
    timeout: float | None = None  # seconds until an adapter that is not there yet is given up


class OfferAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Lists an adapter that is read when a request comes for it; one that is listed already stays as it is.

    Answered by `CallResult` at once, for a hub repository when it is fetched.
    """

    call_id: int
    name: str
    source: str


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by `CallResult` when drained and freed on every tier."""

    call_id: int
    name: str
    timeout: float = 30.0  # seconds until what still uses it is ended
    force: bool = False  # it is ended at once


class PinAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    call_id: int
    name: str
    pinned: bool


class GetStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by `CallResult` with fresh `stats`."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


Command = Submit | Abort | LoadAdapter | OfferAdapter | UnloadAdapter | PinAdapter | GetStats | Shutdown


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one choice of one request."""

    request_id: int
    choice: int
    tokens: list[int]  # an end token that finished the sequence is among them
    finish: FinishReason | None = None
    stop_token: int | None = None  # the token that finished it, where `finish` is STOP
    logprobs: list[TokenLogprob] | None = None  # one for each of `tokens`
    prompt_logprobs: list[TokenLogprob | None] | None = None  # the next ones of the prompt; the first token's is None
    cached_tokens: int = 0  # of the prompt, told with the choice's first output


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step's news for all sequences."""

    outputs: list[SequenceOutput]


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The whole request ended without its result."""

    request_id: int
    code: ErrorCode
    message: str


class AdapterStats(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter's counters; the base is told under the name ''. Counters only grow while the adapter is known."""

    name: str
    tier: str  # arena | host | none
    pinned: bool
    rank: int
    requests: int = 0  # sequences accepted
    prompt_tokens: int = 0
    generated_tokens: int = 0
    waiting: int = 0
    running: int = 0
    state: AdapterState = AdapterState.COLD
    last_used: float = 0.0  # unix seconds, 0 if never


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's gauges and counters at one moment. Counters are totals since the engine's start."""

    step: int = 0
    running: int = 0
    waiting: int = 0
    queue_age: float = 0.0  # seconds since the arrival of the oldest request of which nothing was planned yet
    slots_total: int = 0
    slots_used: int = 0
    slots_pinned: int = 0
    resident: int = 0
    tier_bytes: dict[str, int] = {}  # arena, host
    chunks: dict[str, int] = {}  # kv, prefix, adapter, free (their sum is every chunk)
    counters: dict[str, int] = {}  # names without prefix and _total: preemptions, prefix_hit_tokens, ...
    evictions: dict[str, int] = {}  # "tier/reason" -> count
    loads: dict[str, int] = {}  # "stage/outcome" -> count; stages: source, host, device
    adapters: list[AdapterStats] = []
    step_seconds: list[float] = []  # observed since the last Stats that was sent
    step_tokens: list[int] = []  # likewise
    step_sequences: list[int] = []  # likewise
    queue_seconds: list[float] = []  # waiting until first planned, likewise
    load_seconds: list[tuple[str, float]] = []  # (stage, seconds), likewise


class CallResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers a command that has a call_id: `code` None means it succeeded."""

    call_id: int
    code: ErrorCode | None = None
    message: str = ""
    adapter: AdapterInfo | None = None
    stats: Stats | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine's first message."""

    model: ModelInfo
    adapters: list[AdapterInfo]


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent in place of `Ready`; the engine exits after it."""

    code: ErrorCode
    message: str


class AdapterUpdated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An adapter appeared, or its state, pin or error changed (not sent for mere tier changes of a served adapter)."""

    adapter: AdapterInfo


class AdapterRemoved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It was unloaded, or a version that a load in place had replaced has ended (another bears the name then)."""

    name: str
    adapter_id: int


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent every second: the loop lives, and the running step is not older than its bound."""

    stats: Stats
    hung: bool = False


Event = StepOutputs | RequestFailed | CallResult | Ready | StartFailed | AdapterUpdated | AdapterRemoved | Heartbeat

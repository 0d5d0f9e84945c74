"""The fields that /v1/completions and /v1/chat/completions share, with their ranges. null always means the default."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.errors import bad_request
from gateway.protocol.parse import not_supported

MAX_CHOICES = 2048  # prompts times n of one call
MAX_STOPS = 32
MAX_STOP_IDS, MAX_BIAS = 256, 1024  # of a request's: each row's step looks at all of them
INT64 = 2**63

Count = Annotated[int, Meta(ge=0, le=INT64 - 1)]
Positive = Annotated[int, Meta(ge=1, le=INT64 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=INT64 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=512)]
StopIds = Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)]
# token id as a string -> bias
Bias = Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIAS)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`; allowed only with `stream: true`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted when not true


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of both requests: what is sampled, and what is accepted by name alone."""

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT64 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: Bias | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: StopIds | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None  # keeps the prefix cache apart

    priority: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None  # lower goes first; see --schedule-policy

    user: str | None = None  # ignored
    metadata: dict[str, Any] | None = None  # ignored
    store: bool | None = None  # ignored
    service_tier: str | None = None  # ignored
    safety_identifier: str | None = None  # ignored
    prompt_cache_key: str | None = None  # ignored
    prompt_cache_retention: str | None = None  # ignored

    def check(self) -> None:
        """What the types cannot say. Raises ApiError (400)."""
        if self.stream_options is None:
            return
        if not self.stream:
            raise bad_request("'stream_options' is allowed only with 'stream': true.", param="stream_options")
        if self.stream_options.include_obfuscation:
            raise not_supported("stream_options.include_obfuscation")

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

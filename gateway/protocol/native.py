"""POST /generate, SGLang's own route: the request, the answer and a stream's events. null always means the default."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.errors import bad_request
from gateway.protocol.fields import INT64, MAX_STOPS, Bias, Count, Stop, StopIds, TokenId
from gateway.protocol.parse import require_neutral

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "return_hidden_states": (False,),
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "input_embeds": (),
    "token_ids_logprob": (),
    "session_params": (),
    "custom_logit_processor": (),
}
SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "spaces_between_special_tokens": (True,),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "stop_regex": (),
    "custom_params": (),
}


class NativeSampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params`, with SGLang's names and defaults."""

    max_new_tokens: Count | None = None  # 128
    min_new_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None  # 1; 0: greedy
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT64 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: Bias | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: StopIds | None = None
    no_stop_trim: bool | None = None  # a stop string or stop token is part of the text
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    sampling_seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None  # SGLang's name of `seed`

    spaces_between_special_tokens: bool | None = None  # this and the following: accepted at values that change nothing
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    stop_regex: Any = None
    custom_params: Any = None

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt or a list of them, as text or as token ids; lists beside a list of prompts have one entry for each."""

    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    lora_path: str | list[str | None] | None = None  # an adapter's name; null: the base
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Meta(ge=-1, le=INT64 - 1)] | None = None  # of the prompt, from here; -1: none
    top_logprobs_num: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_text_in_logprobs: bool | None = None
    rid: str | list[str] | None = None
    extra_key: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None  # keeps the prefix cache apart
    priority: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None  # lower goes first; see --schedule-policy
    log_metrics: bool | None = None  # ignored

    return_hidden_states: bool | None = None  # this and the following: accepted at values that change nothing
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    input_embeds: Any = None
    token_ids_logprob: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None

    def check(self) -> None:
        """What the types cannot say. Raises ApiError (400)."""
        require_neutral(self, NEUTRAL)
        samplings = self.sampling_params if isinstance(self.sampling_params, list) else [self.sampling_params]
        for sampling in filter(None, samplings):
            require_neutral(sampling, SAMPLING_NEUTRAL)
        if (self.text is None) == (self.input_ids is None):
            raise bad_request("Give one of 'text' and 'input_ids'.", param="text")
        if not self.return_logprob and (self.top_logprobs_num or self.logprob_start_len not in (None, -1)):
            reason = "'top_logprobs_num' and 'logprob_start_len' need 'return_logprob': true."
            raise bad_request(reason, param="return_logprob")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids. Raises ApiError (400) where there are none, or kinds are mixed."""
        given: list[Any] = [self.text] if isinstance(self.text, str) else list(self.text or self.input_ids or ())
        if not given:
            raise bad_request(f"'{self.source}': is empty.", param=self.source)
        if self.text is not None:
            return given
        kinds = {type(item) for item in given}
        if len(kinds) > 1:
            reason = "a list must hold only token ids, or only lists of token ids"
            raise bad_request(f"'input_ids': {reason}.", param="input_ids")
        return [given] if kinds == {int} else given

    @property
    def is_single(self) -> bool:
        """One prompt that is no list of one."""
        if self.input_ids:
            return isinstance(self.input_ids[0], int)
        return isinstance(self.text, str)

    @property
    def source(self) -> str:
        """The field that holds the prompts."""
        return "input_ids" if self.text is None else "text"


class NativeFinish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a text ended."""

    type: Literal["stop", "length"]
    matched: str | int | None = None  # the stop string or token id that ended it
    length: int | None = None  # tokens generated, where the limit ended it


LogprobEntry = tuple[float | None, int, str | None]  # log-probability, token id, its text where that was asked for


class MetaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one text so far; the log-probabilities are there where they were asked for."""

    id: str
    finish_reason: NativeFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float  # seconds
    input_token_logprobs: list[LogprobEntry] | UnsetType = UNSET
    output_token_logprobs: list[LogprobEntry] | UnsetType = UNSET
    input_top_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """One text: the whole of it, or in a stream all of it so far."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET  # in streams of several texts: which one

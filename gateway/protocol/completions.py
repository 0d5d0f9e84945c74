"""POST /v1/completions: the request, the answer and a stream's chunks."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.errors import bad_request
from gateway.protocol.fields import Count, SamplingFields, TokenId
from gateway.protocol.parse import not_supported, require_neutral
from gateway.protocol.usage import Usage

NEUTRAL = {"suffix": ("",)}


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Every field of the route; any other is refused."""

    prompt: str | list[str | TokenId | list[TokenId]]  # one text, texts, one list of ids, or lists of ids
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None  # accepted at n
    suffix: str | None = None  # accepted when empty

    def check(self) -> None:
        """What the types cannot say. Raises ApiError (400)."""
        super().check()
        require_neutral(self, NEUTRAL)
        if self.best_of not in (None, self.n or 1):
            raise not_supported("best_of")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids. Raises ApiError (400) where kinds are mixed or there are none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) != 1:
            reason = "must hold only texts, only token ids, or only lists of ids" if kinds else "must not be empty"
            raise bad_request(f"'prompt': {reason}.", param="prompt")
        if kinds == {int}:
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a token: the prompt's too with `echo`, whose first has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters from the start of the choice's text


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer, and each chunk of a stream: there `usage` is left out where it was not asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # unix seconds
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET

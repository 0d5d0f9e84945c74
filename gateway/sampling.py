"""A request's sampling fields to the engine's SamplingParams: defaults filled in, context and vocabulary checked."""

import secrets
from typing import Any

from engine.types import ModelInfo, SamplingParams
from gateway.errors import ApiError, bad_request
from gateway.protocol.fields import SamplingFields
from gateway.state import Gateway

SEED_MASK = 2**63 - 1
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PENALTIES = ("presence_penalty", "frequency_penalty")


def sampling_params(
    gateway: Gateway,
    request: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What the engine needs of a validated request.

    Raises:
        ApiError: 400 where a token id is outside the vocabulary, or `min_tokens` above `max_tokens`.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        reason = f"'min_tokens': {min_tokens} is more than the {max_tokens} tokens that may be generated."
        raise bad_request(reason, param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=draw_seed(request.seed),
        stop_token_ids=stop_tokens(gateway, request.stop_token_ids, "stop_token_ids"),
        logit_bias=logit_bias(request.logit_bias, gateway.client.model),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **_shape(gateway, request),
    )


def draw_seed(given: int | None) -> int:
    """63 bits: the client's own, negative ones folded, or fresh ones."""
    return secrets.randbits(63) if given is None else given & SEED_MASK


def default_sampling(gateway: Gateway) -> dict[str, Any]:
    """The omitted fields' values, as --sampling-defaults says: the checkpoint's, or none (OpenAI's)."""
    if gateway.settings.sampling_defaults != "model":
        return {}
    named = gateway.client.model.generation_defaults
    return {name: named[name] for name in MODEL_DEFAULTS if named.get(name) is not None}


def fit_max_tokens(model: ModelInfo, prompt_tokens: int, asked: int | None, default: int | None = None) -> int:
    """How many tokens may be generated: as asked, or at most `default` of what the context leaves.

    Raises:
        ApiError: 400 `context_length_exceeded` where the prompt, or the prompt and what was asked, do not fit.
    """
    left = model.max_model_len - prompt_tokens
    if asked is None and left < 1:
        raise _too_long(model, prompt_tokens, 1, "1 to generate")
    if asked is not None and asked > left:
        raise _too_long(model, prompt_tokens, asked, f"{asked} for max_tokens")
    return min(left, left if default is None else default) if asked is None else asked


def logit_bias(given: dict[str, float] | None, model: ModelInfo) -> dict[int, float]:
    """Token ids as numbers. Raises ApiError (400) where a key is none, or outside the vocabulary."""
    return {_bias_key(key, model.vocab_size): bias for key, bias in (given or {}).items()}


def stop_tokens(gateway: Gateway, given: list[int] | None, param: str) -> tuple[int, ...]:
    """Each once. Raises ApiError (400) where one is outside the vocabulary."""
    gateway.prompts.require_known(given or (), param)
    return tuple(dict.fromkeys(given or ()))


def _bias_key(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 20 and int(key) < vocab_size):
        reason = f"'logit_bias': keys are token ids below {vocab_size}, as strings."
        raise bad_request(reason, param="logit_bias")
    return int(key)


def _shape(gateway: Gateway, request: SamplingFields) -> dict[str, Any]:
    """The fields that shape the distribution; values that are not given stay the struct's own defaults."""
    named = {name: getattr(request, name) for name in (*MODEL_DEFAULTS, *PENALTIES)}
    shape = default_sampling(gateway) | {name: value for name, value in named.items() if value is not None}
    if shape.get("top_k") == -1:
        shape["top_k"] = 0
    if shape.get("top_p") == 0:  # the smallest nucleus: the likeliest token alone
        shape |= {"top_p": 1.0, "top_k": 1}
    return shape


def _too_long(model: ModelInfo, prompt_tokens: int, more: int, asked: str) -> ApiError:
    total = f"{prompt_tokens + more}: {prompt_tokens} in the prompt and {asked}"
    message = f"This model's maximum context length is {model.max_model_len} tokens; the request needs {total}."
    return bad_request(message, param="max_tokens", code="context_length_exceeded")

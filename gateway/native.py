"""SGLang's /generate: from a validated request to a call, and its answers, which always hold the whole text so far."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from engine.types import FinishReason, SamplingParams, TokenLogprob
from gateway.call import Pending
from gateway.choice import Job, Piece
from gateway.detokenize import StopStrings
from gateway.errors import ApiError, bad_request, quote
from gateway.generation import run
from gateway.logprobs import LOWEST, token_text
from gateway.models import ResolvedModel
from gateway.prompt import Prompt
from gateway.protocol.fields import MAX_CHOICES
from gateway.protocol.native import (
    Generated,
    GenerateRequest,
    LogprobEntry,
    MetaInfo,
    NativeFinish,
    NativeSampling,
)
from gateway.sampling import draw_seed, fit_max_tokens, logit_bias, stop_tokens
from gateway.state import Gateway
from gateway.stream import event
from gateway.tokenizer import Tokenizer

DEFAULT_TOKENS = 128
SHAPE = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
T = TypeVar("T")


async def native_call(gateway: Gateway, request: GenerateRequest) -> "NativeCall":
    """Resolves the adapters and encodes the prompts.

    Raises:
        ApiError: 400, naming the field; an unknown adapter is one too.
    """
    request.check()
    given = request.prompts()
    sampling: NativeSampling | list[NativeSampling] = request.sampling_params or NativeSampling()
    samplings = _spread(sampling, len(given), request, "sampling_params")
    names = _spread(request.lora_path, len(given), request, "lora_path")
    n = _choices(samplings, len(given))
    models = [await _resolve(gateway, name) for name in names]
    jobs = [  # one that does not fit is refused before the next is encoded
        _job(gateway, request, model, await _prompt(gateway, prompt), sampling, n=n)
        for model, prompt, sampling in zip(models, given, samplings, strict=True)
    ]
    return NativeCall(gateway, request, jobs, _ids(request.rid, len(given), n))


@dataclass(frozen=True, slots=True)
class NativeCall:
    """Jobs and how to tell of them."""

    gateway: Gateway
    request: GenerateRequest
    jobs: list[Job]
    ids: list[str]  # one for each choice

    async def answer(self) -> Generated | list[Generated]:
        """An object for one prompt, a list for a list; with `n` above 1 always a list."""
        start, told = time.perf_counter(), self._told()
        async with contextlib.aclosing(run(self.gateway, self.jobs)) as steps:
            async for pieces in steps:
                for piece in pieces:
                    told[piece.choice].add(piece)
        answers = [self._generated(each, start) for each in told]
        return answers[0] if self._is_single else answers

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events, encoded. Each tells of all so far, so what came together is one event a choice."""
        start, told = time.perf_counter(), self._told()
        pending = Pending(self.gateway.settings.stream_interval)
        async with contextlib.aclosing(run(self.gateway, self.jobs)) as steps:
            async for pieces in steps:
                ready = list(pending.push(pieces))
                for piece in ready:
                    told[piece.choice].add(piece)
                for choice in dict.fromkeys(piece.choice for piece in ready):
                    yield event(self._generated(told[choice], start, streamed=True))
                    await asyncio.sleep(0)  # an event may be large: others' come between

    @property
    def _is_single(self) -> bool:
        return self.request.is_single and len(self.ids) == 1

    def _told(self) -> list["Told"]:
        """One for each choice."""
        tokenizer = self.gateway.prompts.tokenizer if self.request.return_text_in_logprobs else None
        top, first = bool(self.request.top_logprobs_num), max(self.request.logprob_start_len or 0, 0)
        prompts = [Shown(tokenizer, top, job.prompt[first:]) for job in self.jobs]
        return [
            Told(Piece(choice), Shown(tokenizer, top), prompts[choice // self.jobs[0].n], first)
            for choice in range(len(self.ids))
        ]

    def _generated(self, told: "Told", start: float, *, streamed: bool = False) -> Generated:
        piece, choice = told.piece, told.piece.choice
        meta = MetaInfo(
            id=self.ids[choice],
            finish_reason=_finish(piece),
            prompt_tokens=len(self._job(choice).prompt),
            completion_tokens=len(piece.tokens),
            cached_tokens=piece.cached_tokens,
            e2e_latency=time.perf_counter() - start,
        )
        return Generated(
            text=piece.text,
            output_ids=piece.tokens,
            meta_info=told.with_logprobs(meta) if self.request.return_logprob else meta,
            index=choice if streamed and not self._is_single else UNSET,
        )

    def _job(self, choice: int) -> Job:
        return self.jobs[choice // self.jobs[0].n]


class Shown:
    """Log-probabilities as they are told, which grow: what has been made of one is not made again."""

    def __init__(self, tokenizer: Tokenizer | None, top: bool, tokens: Sequence[int] = ()) -> None:
        """tokenizer: where texts are wanted; top: whether the likeliest are; tokens: a prompt's."""
        self.entries: list[LogprobEntry] = []
        self.tops: list[list[LogprobEntry] | None] | UnsetType = [] if top else UNSET
        self._tokenizer = tokenizer
        self._tokens = tokens

    def add(self, logprobs: Iterable[TokenLogprob | None]) -> None:
        """None: a prompt's first."""
        for entry in logprobs:
            token = entry.token if entry is not None else self._tokens[len(self.entries)]
            self.entries.append(self._entry(token, None if entry is None else entry.logprob))
            if self.tops is not UNSET:
                self.tops.append(None if entry is None else [self._entry(*top) for top in entry.top])

    def _entry(self, token: int, logprob: float | None) -> LogprobEntry:
        text = None if self._tokenizer is None else token_text(self._tokenizer.token_bytes(token))
        return None if logprob is None else max(logprob, LOWEST), token, text


@dataclass(slots=True)
class Told:
    """One choice so far."""

    piece: Piece
    output: Shown
    prompt: Shown  # shared by the prompt's choices, the first of which brings it
    skipped: int  # tokens of the prompt before those that are told of

    def add(self, later: Piece) -> None:
        self.piece.add(later)
        self.output.add(later.logprobs)
        new, self.skipped = later.prompt_logprobs[self.skipped :], max(0, self.skipped - len(later.prompt_logprobs))
        self.prompt.add(new)

    def with_logprobs(self, meta: MetaInfo) -> MetaInfo:
        return msgspec.structs.replace(
            meta,
            input_token_logprobs=self.prompt.entries,
            output_token_logprobs=self.output.entries,
            input_top_logprobs=self.prompt.tops,
            output_top_logprobs=self.output.tops,
        )


def _finish(piece: Piece) -> NativeFinish | None:
    match piece.finish:
        case None:
            return None
        case FinishReason.LENGTH:
            return NativeFinish(type="length", length=len(piece.tokens))
        case _:
            return NativeFinish(type="stop", matched=piece.matched)


def _spread(value: T | list[T], count: int, request: GenerateRequest, param: str) -> list[T]:
    """One value for each prompt. Raises ApiError (400) where a list has another length."""
    if not isinstance(value, list):
        return [value] * count
    if request.is_single or len(value) != count:
        what = "one prompt that is no list" if request.is_single else f"{count} prompts"
        raise bad_request(f"'{param}': {len(value)} entries for {what}.", param=param)
    return value


def _choices(samplings: Sequence[NativeSampling], prompts: int) -> int:
    """The `n` that all prompts share."""
    counts = {sampling.n or 1 for sampling in samplings}
    if len(counts) > 1:
        raise bad_request("'sampling_params': 'n' must be the same for all prompts.", param="sampling_params")
    n = counts.pop()
    if prompts * n > MAX_CHOICES:
        raise bad_request(f"'text': more than {MAX_CHOICES} choices in one request.", param="text")
    return n


def _ids(given: str | list[str] | None, prompts: int, n: int) -> list[str]:
    """An id for each choice: the client's own, told apart by a number where there are several."""
    if isinstance(given, list):
        if len(given) != prompts:
            raise bad_request(f"'rid': {len(given)} entries for {prompts} prompts.", param="rid")
        return [f"{rid}_{i}" if n > 1 else rid for rid in given for i in range(n)]
    rid = given or secrets.token_hex(16)
    return [rid] if prompts * n == 1 else [f"{rid}_{i}" for i in range(prompts * n)]


async def _resolve(gateway: Gateway, name: str | None) -> ResolvedModel:
    """The base for null, else an adapter by its bare name or as base:adapter."""
    registry = gateway.registry
    if name is None:
        return await registry.resolve(registry.base)
    try:
        model = await registry.resolve(name)
    except ApiError as error:
        if error.status >= 500:  # it is known, and cannot be had now
            raise
        model = None
    if model is None or model.adapter is None:
        reason = f"no adapter is named {quote(name)}; GET /v1/models lists what is served"
        raise bad_request(f"'lora_path': {reason}.", param="lora_path", code="adapter_not_found")
    return model


async def _prompt(gateway: Gateway, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        return await gateway.prompts.text(given, param="text")
    return gateway.prompts.ids(given, param="input_ids")


def _job(
    gateway: Gateway, request: GenerateRequest, model: ResolvedModel, prompt: Prompt, sampling: NativeSampling, n: int
) -> Job:
    return Job(
        model=model,
        prompt=prompt.ids,
        params=_params(gateway, request, sampling, len(prompt.ids)),
        n=n,
        salt=request.extra_key,
        priority=request.priority or 0,
        stops=StopStrings(stops) if (stops := sampling.stops()) else None,
        include_stop=bool(sampling.no_stop_trim),
        skip_special_tokens=sampling.skip_special_tokens is not False,
        fresh=False,
    )


def _params(gateway: Gateway, request: GenerateRequest, sampling: NativeSampling, prompt_tokens: int) -> SamplingParams:
    """This route's own defaults: temperature 1 and 128 tokens, whatever the checkpoint names."""
    max_tokens = _max_tokens(gateway, sampling, prompt_tokens)
    min_tokens = sampling.min_new_tokens or 0
    if min_tokens > max_tokens:
        reason = f"'min_new_tokens': {min_tokens} is more than the {max_tokens} tokens that may be generated."
        raise bad_request(reason, param="sampling_params.min_new_tokens")
    shape = {name: value for name in SHAPE if (value := getattr(sampling, name)) is not None}
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=draw_seed(sampling.seed if sampling.seed is not None else sampling.sampling_seed),
        top_k=max(sampling.top_k or 0, 0),
        stop_token_ids=stop_tokens(gateway, sampling.stop_token_ids, "sampling_params.stop_token_ids"),
        logit_bias=logit_bias(sampling.logit_bias, gateway.client.model),
        ignore_eos=bool(sampling.ignore_eos),
        logprobs=(request.top_logprobs_num or 0) if request.return_logprob else None,
        prompt_logprobs=_prompt_logprobs(request, prompt_tokens),
        **shape,
    )


def _max_tokens(gateway: Gateway, sampling: NativeSampling, prompt_tokens: int) -> int:
    try:
        return fit_max_tokens(gateway.client.model, prompt_tokens, sampling.max_new_tokens, DEFAULT_TOKENS)
    except ApiError as error:  # the field has another name here
        message = error.message.replace("max_tokens", "max_new_tokens")
        raise bad_request(message, param="sampling_params.max_new_tokens", code=error.code) from None


def _prompt_logprobs(request: GenerateRequest, prompt_tokens: int) -> int | None:
    first = request.logprob_start_len
    if not request.return_logprob or first is None or first == -1:
        return None
    if first >= prompt_tokens:
        reason = f"{first} is not within the prompt of {prompt_tokens} tokens"
        raise bad_request(f"'logprob_start_len': {reason}.", param="logprob_start_len")
    return request.top_logprobs_num or 0

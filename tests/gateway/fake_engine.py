"""An in-process stand-in for engine.client.EngineClient: scripted tokens, no model. Used by every gateway test.

A `Script` says which tokens a choice generates; one step brings one token to each running choice. `hold()` stops the
steps until `allow(n)`, so that tests decide when tokens come. Every submission is kept, with what was aborted.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from engine.messages import SequenceOutput, Stats
from engine.types import (
    AdapterInfo,
    AdapterState,
    EngineError,
    ErrorCode,
    FinishReason,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
)


@dataclass
class Submission:
    """One call of `generate`, and what became of it."""

    request_id: int
    prompt: list[int]
    params: SamplingParams
    n: int
    adapter_id: int | None
    salt: str | None
    priority: int
    aborted: set[int] = field(default_factory=set)  # choices aborted before they had finished


Script = Callable[[Submission, int], Iterable[int]]  # (submission, choice) -> the tokens it generates


def echo_prompt(submission: Submission, choice: int) -> Iterable[int]:
    """The default script: the prompt again and again."""
    return itertools.cycle(submission.prompt)


def fixed(*tokens: int) -> Script:
    """Every choice generates these tokens; where they end without an end token, the choice ends by an end token."""
    return lambda submission, choice: tokens


def fake_logprob(token: int, alternatives: int, vocab: int) -> TokenLogprob:
    """A made-up but reproducible log-probability: the token itself is always the most likely."""
    top = [((token + i) % vocab, -0.25 * (i + 1)) for i in range(alternatives)]
    return TokenLogprob(token=token, logprob=-0.25, rank=1, top=top)


def model_info(**changes: object) -> ModelInfo:
    """A small model's description; `changes` replace fields."""
    fields: dict[str, object] = {
        "served_name": "llama",
        "model_path": "/models/llama",
        "folder": "/models/llama",
        "max_model_len": 256,
        "vocab_size": 512,
        "eos_token_ids": (0,),
        "bos_token_id": None,
        "generation_defaults": {},
        "dtype": "float32",
        "device": "cpu",
        "block_tokens": 16,
        "chunk_bytes": 65536,
        "num_chunks": 64,
        "enable_lora": True,
        "max_loras_per_batch": 4,
        "max_loaded_loras": None,
        "max_lora_rank": 64,
        "lora_target_modules": ("q_proj", "v_proj"),
        "lora_backend": "torch",
        "created": 1_700_000_000,
    }
    return ModelInfo(**{**fields, **changes})  # type: ignore[arg-type]


class FakeGeneration:
    """What `FakeEngine.generate` returns; the same shape as the client's `Generation`."""

    def __init__(self, engine: "FakeEngine", submission: Submission) -> None:
        self.request_id = submission.request_id
        self._engine = engine
        self._submission = submission
        self._scripts = {i: iter(engine.script(submission, i)) for i in range(submission.n)}
        self._generated = dict.fromkeys(self._scripts, 0)
        self.wake = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self, choice: int | None = None) -> None:
        gone = set(self._scripts) if choice is None else {choice} & set(self._scripts)
        self._submission.aborted |= gone
        for index in gone:
            self._finish(index)

    def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        await self._turn()
        if not self._scripts:
            raise StopAsyncIteration
        if self._engine.failure is not None:
            self._scripts.clear()
            self._engine.left(self)
            raise self._engine.failure
        return [self._step(choice) for choice in list(self._scripts)]

    async def _turn(self) -> None:
        await asyncio.sleep(0)
        while self._scripts and not self._engine.take_permit():
            self.wake.clear()
            await self.wake.wait()

    def _step(self, choice: int) -> SequenceOutput:
        params = self._submission.params
        first = self._generated[choice] == 0
        prompt_logprobs = self._prompt_logprobs() if first and choice == 0 else None
        if params.max_tokens == 0:
            self._finish(choice)
            return SequenceOutput(
                self.request_id, choice, [], FinishReason.LENGTH, prompt_logprobs=prompt_logprobs, cached_tokens=0
            )
        token = next(self._scripts[choice], self._engine.model.eos_token_ids[0])
        self._generated[choice] += 1
        finish = self._finish_reason(choice, token)
        if finish is not None:
            self._finish(choice)
        return SequenceOutput(
            request_id=self.request_id,
            choice=choice,
            tokens=[token],
            finish=finish,
            stop_token=token if finish is FinishReason.STOP else None,
            logprobs=self._logprobs([token], params.logprobs),
            prompt_logprobs=prompt_logprobs,
            cached_tokens=self._engine.cached_tokens if first else 0,
        )

    def _finish_reason(self, choice: int, token: int) -> FinishReason | None:
        params = self._submission.params
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._engine.model.eos_token_ids))
        if token in ends and self._generated[choice] > params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._generated[choice] >= params.max_tokens else None

    def _logprobs(self, tokens: Sequence[int], alternatives: int | None) -> list[TokenLogprob] | None:
        if alternatives is None:
            return None
        return [fake_logprob(token, alternatives, self._engine.model.vocab_size) for token in tokens]

    def _prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        rest = self._logprobs(self._submission.prompt[1:], self._submission.params.prompt_logprobs)
        return None if rest is None else [None, *rest]

    def _finish(self, choice: int) -> None:
        del self._scripts[choice]
        if not self._scripts:
            self._engine.left(self)


class FakeEngine:
    """The client's public face: `model`, `adapters`, `alive`, `generate` and the adapter calls."""

    def __init__(
        self, model: ModelInfo | None = None, adapters: Sequence[str] = (), script: Script = echo_prompt
    ) -> None:
        self.model = model or model_info()
        self.adapters: dict[str, AdapterInfo] = {}
        self.alive = True
        self.script = script
        self.failure: EngineError | None = None  # raised at the next step of every running request
        self.cached_tokens = 0
        self.submissions: list[Submission] = []
        self.calls: list[tuple[str, dict[str, object]]] = []  # loads and unloads
        self._ids = itertools.count(1)
        self._running: set[FakeGeneration] = set()
        self._permits: int | None = None  # None: steps are free
        self._changed = asyncio.Event()
        for name in adapters:
            self._add(name, f"/adapters/{name}", pinned=False)

    def generate(
        self,
        *,
        prompt: list[int],
        params: SamplingParams,
        n: int = 1,
        adapter_id: int | None = None,
        salt: str | None = None,
        priority: int = 0,
    ) -> FakeGeneration:
        submission = Submission(next(self._ids), prompt, params, n, adapter_id, salt, priority)
        self.submissions.append(submission)
        generation = FakeGeneration(self, submission)
        self._running.add(generation)
        self._note()
        return generation

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        pinned: bool | None = None,
        revision: str | None = None,
        weight: float | None = None,
        inplace: bool = False,
        timeout: float | None = None,
    ) -> AdapterInfo:
        self.calls.append(("load", {"name": name, "revision": revision, "inplace": inplace, "timeout": timeout}))
        old = self.adapters.get(name)
        if old is not None and not inplace:
            raise EngineError(ErrorCode.ADAPTER_EXISTS, f"adapter '{name}' is loaded already")
        if old is not None:
            pinned, weight = old.pinned if pinned is None else pinned, old.weight if weight is None else weight
        return self._add(name, source, pinned=bool(pinned), weight=1.0 if weight is None else weight)

    async def offer_adapter(self, name: str, source: str) -> AdapterInfo:
        self.calls.append(("offer", {"name": name, "source": source}))
        return self.adapters.get(name) or self._add(name, source, pinned=False, weight=1.0)

    async def unload_adapter(self, name: str, *, timeout: float = 30.0, force: bool = False) -> None:
        self.calls.append(("unload", {"name": name, "timeout": timeout, "force": force}))
        self._known(name)
        del self.adapters[name]

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        old = self._known(name)
        return self._put(msgspec.structs.replace(old, pinned=pinned))

    async def stats(self) -> Stats:
        return Stats(running=self.running)

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    def hold(self) -> None:
        """No step comes from now on but those that `allow` grants."""
        self._permits = 0

    def allow(self, steps: int | None) -> None:
        """Grants this many steps, over all requests; None: steps are free again."""
        self._permits = None if steps is None else (self._permits or 0) + steps
        for generation in self._running:
            generation.wake.set()

    def take_permit(self) -> bool:
        if self._permits is None:
            return True
        granted = self._permits > 0
        self._permits -= granted
        return granted

    def left(self, generation: FakeGeneration) -> None:
        self._running.discard(generation)
        generation.wake.set()
        self._note()

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Waits until requests came or went so that `condition` holds; TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _note(self) -> None:
        self._changed.set()

    def _known(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise EngineError(ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name}' is not loaded")
        return self.adapters[name]

    def _add(self, name: str, source: str, *, pinned: bool, weight: float = 1.0) -> AdapterInfo:
        state = AdapterState.RESIDENT if pinned else AdapterState.HOST
        return self._put(
            AdapterInfo(
                name=name, adapter_id=next(self._ids), source=source, state=state, pinned=pinned, weight=weight, rank=8
            )
        )

    def _put(self, adapter: AdapterInfo) -> AdapterInfo:
        self.adapters[adapter.name] = adapter
        return adapter

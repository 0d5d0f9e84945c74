"""What every handler finds at `request.app.state.gateway`, and the faces it needs of engine, metrics and settings.

One `Gateway` belongs to one engine: the supervisor that starts another engine puts a new `Gateway` in its place.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from engine.messages import SequenceOutput, Stats
from engine.types import AdapterInfo, ModelInfo, SamplingParams

if TYPE_CHECKING:
    from gateway.keeper import Keeper
    from gateway.models import ModelRegistry
    from gateway.prompt import PromptEncoder


class Generation(Protocol):
    """One submitted prompt: iterates over what each step brought; leaving the block aborts what is unfinished."""

    @property
    def request_id(self) -> int: ...
    def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]: ...
    def abort(self, choice: int | None = None) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """The gateway's view of the engine: engine.client.EngineClient, or a scripted one in tests."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def adapters(self) -> Mapping[str, AdapterInfo]: ...
    @property
    def alive(self) -> bool: ...
    def generate(
        self,
        *,
        prompt: list[int],
        params: SamplingParams,
        n: int = 1,
        adapter_id: int | None = None,
        salt: str | None = None,
        priority: int = 0,
    ) -> Generation: ...
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
    ) -> AdapterInfo: ...
    async def offer_adapter(self, name: str, source: str) -> AdapterInfo: ...
    async def unload_adapter(self, name: str, *, timeout: float = 30.0, force: bool = False) -> None: ...
    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo: ...
    async def stats(self) -> Stats: ...


class RequestTimer(Protocol):
    """Follows one choice from its submission to its end."""

    def first_token(self) -> None: ...
    def tokens(self, count: int) -> None: ...
    def finished(self, reason: str, prompt_tokens: int, generated: int) -> None: ...


class Metrics(Protocol):
    def request_started(self, base: str, adapter: str) -> RequestTimer: ...


class Settings(Protocol):
    """The settings that the OpenAI routes read; gateway.settings has the whole."""

    @property
    def sampling_defaults(self) -> str: ...  # model | openai
    @property
    def stream_interval(self) -> int: ...  # tokens of a choice between two events


@dataclass(frozen=True, slots=True)
class Gateway:
    """Everything that a request needs, made once the engine is ready."""

    client: Engine
    registry: "ModelRegistry"
    prompts: "PromptEncoder"
    settings: Settings
    metrics: Metrics
    keeper: "Keeper"

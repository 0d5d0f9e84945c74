"""One HTTP call of an OpenAI route: its jobs, its token counts, and the loop that makes an answer or a stream of it.

What differs between chats and completions is behind `Shape`.
"""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from engine.types import FinishReason
from gateway.choice import Job, Piece
from gateway.generation import run
from gateway.models import ResolvedModel
from gateway.protocol.fields import SamplingFields, StreamOptions
from gateway.protocol.usage import PromptTokensDetails, Usage
from gateway.state import Gateway
from gateway.stream import event

ChunkUsage = Usage | UnsetType | None
EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int  # unix seconds
    model: str  # served id


def new_head(prefix: str, model: ResolvedModel) -> Head:
    return Head(id=f"{prefix}-{secrets.token_hex(16)}", created=int(time.time()), model=model.id)


class Shape(Protocol):
    """How one route's answers look. Its methods are called once a choice (`chunk`: once an event) and in order."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> msgspec.Struct:
        """The unstreamed answer from each choice's merged pieces."""
        ...

    def chunk(self, piece: Piece, usage: ChunkUsage) -> msgspec.Struct:
        """One choice's next chunk."""
        ...

    def last(self, usage: Usage) -> msgspec.Struct:
        """The chunk without choices that ends a stream whose usage was asked for."""
        ...


@dataclass(slots=True)
class Tally:
    """Tokens of a call so far."""

    prompt_tokens: int
    n: int
    generated: int = 0
    cached: int = 0

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.generated += len(piece.tokens)
            if piece.choice % self.n == 0:  # a prompt counts once, and so does what was cached of it
                self.cached += piece.cached_tokens

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            total_tokens=self.prompt_tokens + self.generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached),
        )


@dataclass(frozen=True, slots=True)
class Call:
    """Jobs and the shape of their answer."""

    gateway: Gateway
    jobs: list[Job]
    shape: Shape
    options: StreamOptions = field(default_factory=StreamOptions)

    async def answer(self) -> msgspec.Struct:
        """The whole answer."""
        tally = self._tally()
        merged = {i: Piece(i) for i in range(len(self.jobs) * tally.n)}
        async with contextlib.aclosing(run(self.gateway, self.jobs)) as steps:
            async for pieces in steps:
                tally.add(pieces)
                for piece in pieces:
                    merged[piece.choice].add(piece)
        return self.shape.whole(list(merged.values()), tally.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events, encoded; what came together is yielded together."""
        tally = self._tally()
        pending = Pending(self.gateway.settings.stream_interval)
        async with contextlib.aclosing(run(self.gateway, self.jobs)) as steps:
            async for pieces in steps:
                tally.add(pieces)
                ready = [self.shape.chunk(piece, self._chunk_usage(tally)) for piece in pending.push(pieces)]
                if ready:
                    yield b"".join(map(event, ready))
        if self.options.include_usage:
            yield event(self.shape.last(tally.usage()))

    def _tally(self) -> Tally:
        return Tally(sum(len(job.prompt) for job in self.jobs), self.jobs[0].n)

    def _chunk_usage(self, tally: Tally) -> ChunkUsage:
        if self.options.continuous_usage_stats:
            return tally.usage()
        return None if self.options.include_usage else UNSET


class Pending:
    """Pieces of a stream that wait: each choice is told of at its first token, then every `interval` tokens."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._pieces: dict[int, Piece] = {}
        self._started: set[int] = set()

    def push(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Takes pieces in and yields those that are due."""
        for piece in pieces:
            if (waiting := self._pieces.setdefault(piece.choice, piece)) is not piece:
                waiting.add(piece)
            if self._is_due(waiting):
                self._started.add(piece.choice)
                yield self._pieces.pop(piece.choice)

    def _is_due(self, piece: Piece) -> bool:
        if piece.finish is not None:
            return True
        wanted = self._interval if piece.choice in self._started else 1
        return len(piece.tokens) >= wanted and bool(piece.text or piece.logprobs)


def end_reason(finish: FinishReason | None) -> EndReason | None:
    """A finish reason in OpenAI's words."""
    match finish:
        case None:
            return None
        case FinishReason.LENGTH:
            return "length"
        case _:
            return "stop"


def require_end(finish: FinishReason | None) -> EndReason:
    """The finish reason of a whole answer, which always has one."""
    reason = end_reason(finish)
    assert reason is not None
    return reason


def stream_options(request: SamplingFields) -> StreamOptions:
    return request.stream_options or StreamOptions()

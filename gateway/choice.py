"""One choice on its way: the engine's outputs become text, cut at stop strings, with each token's place in it."""

from dataclasses import dataclass, field

from engine.messages import SequenceOutput
from engine.types import EngineError, ErrorCode, FinishReason, SamplingParams, TokenLogprob
from gateway.detokenize import Detokenizer, StopMatch, StopStrings, StopWatch
from gateway.models import ResolvedModel
from gateway.state import RequestTimer
from gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to be answered `n` times."""

    model: ResolvedModel
    prompt: list[int]
    params: SamplingParams
    n: int = 1
    salt: str | None = None
    priority: int = 0
    stops: StopStrings | None = None
    include_stop: bool = False  # a stop string or stop token is part of the text
    skip_special_tokens: bool = True
    fresh: bool = True  # the answer's text begins here; False: it continues the prompt's


@dataclass(slots=True)
class Piece:
    """What was added to one choice."""

    choice: int  # over all jobs of the call
    parts: list[str] = field(default_factory=list)  # of the text
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of each token, in characters of the generated text
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one for each token, or none at all
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    cached_tokens: int = 0
    finish: FinishReason | None = None
    matched: str | int | None = None  # the stop string or token that ended it

    @property
    def text(self) -> str:
        """What may be shown of the new text."""
        return "".join(self.parts)

    def add(self, later: "Piece") -> None:
        """Appends what came next to the same choice."""
        self.parts += later.parts
        self.tokens += later.tokens
        self.offsets += later.offsets
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.cached_tokens += later.cached_tokens
        self.finish = later.finish
        self.matched = later.matched


class Choice:
    """Turns outputs into pieces until one of them has a finish reason."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer, timer: RequestTimer) -> None:
        self.finished = False
        self._index = index
        self._job = job
        self._timer = timer
        self._generated = 0
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=job.skip_special_tokens, fresh=job.fresh)
        self._watch = None if job.stops is None else StopWatch(job.stops, include=job.include_stop)

    def push(self, output: SequenceOutput) -> Piece:
        """What `output` adds.

        Raises:
            EngineError: the engine aborted the choice, which nobody here asked for.
        """
        if output.finish is FinishReason.ABORT:
            raise EngineError(ErrorCode.ADAPTER_UNAVAILABLE, "the server aborted the request")
        piece = Piece(self._index, cached_tokens=output.cached_tokens, prompt_logprobs=output.prompt_logprobs or [])
        self._add_tokens(piece, output)
        if piece.finish is None and output.finish is not None:
            self._end(piece, output)
        piece.logprobs = (output.logprobs or [])[: len(piece.tokens)]
        self._time(piece)
        return piece

    def abandon(self) -> None:
        """The call ended before this choice did."""
        if not self.finished:
            self._finish("abort")

    def _add_tokens(self, piece: Piece, output: SequenceOutput) -> None:
        hidden = None if self._job.include_stop else output.stop_token
        last = len(output.tokens) - 1
        for i, token in enumerate(output.tokens):
            self._generated += 1
            piece.tokens.append(token)
            piece.offsets.append(self._detokenizer.length)
            if i < last or hidden is None:
                self._show(piece, self._detokenizer.push(token))
            if piece.finish is not None:
                return

    def _show(self, piece: Piece, text: str) -> None:
        """Adds text as far as it is safe; a stop string ends the piece. Up to min_tokens nothing stops."""
        if self._watch is None or self._generated <= self._job.params.min_tokens:
            piece.parts.append(text)
            return
        match self._watch.push(text):
            case StopMatch(stop=stop, text=shown):
                piece.parts.append(shown)
                piece.finish, piece.matched = FinishReason.STOP, stop
            case shown:
                piece.parts.append(shown)

    def _end(self, piece: Piece, output: SequenceOutput) -> None:
        self._show(piece, self._detokenizer.flush())
        if piece.finish is None:
            piece.parts.append(self._watch.flush() if self._watch else "")
            piece.finish, piece.matched = output.finish, output.stop_token

    def _time(self, piece: Piece) -> None:
        if piece.tokens and self._generated == len(piece.tokens):
            self._timer.first_token()
        if piece.tokens:
            self._timer.tokens(len(piece.tokens))
        if piece.finish is not None:
            self._finish(piece.finish.value)

    def _finish(self, reason: str) -> None:
        self.finished = True
        prompt_tokens = len(self._job.prompt) if self._index % self._job.n == 0 else 0
        self._timer.finished(reason, prompt_tokens, self._generated)

"""Completions: from a validated request to a call, and the shape of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.types import TokenLogprob
from gateway.call import Call, ChunkUsage, Head, end_reason, new_head, stream_options
from gateway.choice import Job, Piece
from gateway.detokenize import StopStrings
from gateway.errors import bad_request
from gateway.logprobs import completion_logprobs
from gateway.models import ResolvedModel
from gateway.prompt import Echo, Prompt
from gateway.protocol.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from gateway.protocol.fields import MAX_CHOICES
from gateway.protocol.usage import Usage
from gateway.sampling import fit_max_tokens, sampling_params
from gateway.state import Gateway
from gateway.tokenizer import Tokenizer

DEFAULT_TOKENS = 16


async def completion_call(gateway: Gateway, request: CompletionRequest) -> Call:
    """Resolves the model and encodes the prompts.

    Raises:
        ApiError: 400 or 404, naming the field.
    """
    request.check()
    model = await gateway.registry.resolve(request.model)
    stops = StopStrings(texts) if (texts := request.stops()) else None
    prompts, jobs = [], []
    for given in _bounded(request):  # one that does not fit is refused before the next is encoded
        prompts.append(await _prompt(gateway, given))
        jobs.append(_job(gateway, request, model, prompts[-1], stops))
    shape = CompletionShape(
        new_head("cmpl", model),
        gateway.prompts.tokenizer,
        n=request.n or 1,
        logprobs=request.logprobs is not None,
        echoes=await _echoes(gateway, request, prompts),
    )
    return Call(gateway, jobs, shape, stream_options(request))


def _bounded(request: CompletionRequest) -> list[str | list[int]]:
    prompts = request.prompts()
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise bad_request(f"'prompt': more than {MAX_CHOICES} choices in one request.", param="prompt")
    return prompts


async def _prompt(gateway: Gateway, given: str | list[int]) -> Prompt:
    return await gateway.prompts.text(given) if isinstance(given, str) else gateway.prompts.ids(given)


def _job(
    gateway: Gateway, request: CompletionRequest, model: ResolvedModel, prompt: Prompt, stops: StopStrings | None
) -> Job:
    limit = fit_max_tokens(gateway.client.model, len(prompt.ids), request.max_tokens, DEFAULT_TOKENS)
    prompt_logprobs = request.logprobs if request.echo else None
    return Job(
        model=model,
        prompt=prompt.ids,
        params=sampling_params(
            gateway, request, max_tokens=limit, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs
        ),
        n=request.n or 1,
        salt=request.cache_salt,
        priority=request.priority or 0,
        stops=stops,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        fresh=False,
    )


async def _echoes(gateway: Gateway, request: CompletionRequest, prompts: list[Prompt]) -> list[Echo]:
    if not request.echo:
        return []
    skip = request.skip_special_tokens is not False
    return [await gateway.prompts.echo(prompt, skip_special_tokens=skip) for prompt in prompts]


@dataclass(slots=True)
class CompletionShape:
    """`text_completion`, whole or in chunks; with echo, a choice's first chunk begins with the prompt."""

    head: Head
    tokenizer: Tokenizer
    n: int
    logprobs: bool
    echoes: list[Echo]  # one for each prompt, or none at all
    prompt_logprobs: dict[int, list[TokenLogprob | None]] = field(default_factory=dict)  # by prompt
    started: set[int] = field(default_factory=set)  # choices whose first chunk has been made

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Completion:
        return self._completion([self._choice(piece) for piece in pieces], usage)

    def chunk(self, piece: Piece, usage: ChunkUsage) -> Completion:
        return self._completion([self._choice(piece)], usage)

    def last(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: ChunkUsage) -> Completion:
        return Completion(
            id=self.head.id, created=self.head.created, model=self.head.model, choices=choices, usage=usage
        )

    def _choice(self, piece: Piece) -> CompletionChoice:
        echo = self._echo(piece)
        return CompletionChoice(
            index=piece.choice,
            text=(echo.text if echo else "") + piece.text,
            logprobs=self._logprobs(piece, echo),
            finish_reason=end_reason(piece.finish),
        )

    def _echo(self, piece: Piece) -> Echo | None:
        """The prompt, for the first chunk of a choice."""
        if not self.echoes or piece.choice in self.started:
            return None
        self.started.add(piece.choice)
        return self.echoes[piece.choice // self.n]

    def _logprobs(self, piece: Piece, echo: Echo | None) -> CompletionLogprobs | None:
        if not self.logprobs:
            return None
        base = len(self.echoes[piece.choice // self.n].text) if self.echoes else 0
        prompt = self._of_prompt(piece) if echo else []
        return completion_logprobs(self.tokenizer, piece, prompt, echo, base)

    def _of_prompt(self, piece: Piece) -> list[TokenLogprob | None]:
        """The prompt's log-probabilities, which its first choice brings and the others share."""
        return self.prompt_logprobs.setdefault(piece.choice // self.n, piece.prompt_logprobs)

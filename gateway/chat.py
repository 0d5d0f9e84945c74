"""Chats: from a validated request to a call, and the shape of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.call import Call, ChunkUsage, Head, end_reason, new_head, require_end, stream_options
from gateway.choice import Job, Piece
from gateway.detokenize import StopStrings
from gateway.logprobs import chat_logprobs
from gateway.prompt import Prompt
from gateway.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from gateway.protocol.messages import for_template
from gateway.protocol.usage import Usage
from gateway.sampling import fit_max_tokens, sampling_params
from gateway.state import Gateway
from gateway.tokenizer import Tokenizer


async def chat_call(gateway: Gateway, request: ChatRequest) -> Call:
    """Resolves the model and renders the conversation.

    Raises:
        ApiError: 400 or 404, naming the field.
    """
    request.check()
    model = await gateway.registry.resolve(request.model)
    prompt = await _prompt(gateway, request)
    limit = fit_max_tokens(gateway.client.model, len(prompt.ids), request.limit())
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    job = Job(
        model=model,
        prompt=prompt.ids,
        params=sampling_params(gateway, request, max_tokens=limit, logprobs=logprobs),
        n=request.n or 1,
        salt=request.cache_salt,
        priority=request.priority or 0,
        stops=StopStrings(stops) if (stops := request.stops()) else None,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        fresh=not request.continue_final_message,
    )
    shape = ChatShape(new_head("chatcmpl", model), gateway.prompts.tokenizer, logprobs=bool(request.logprobs))
    return Call(gateway, [job], shape, stream_options(request))


async def _prompt(gateway: Gateway, request: ChatRequest) -> Prompt:
    continues = bool(request.continue_final_message)
    begins = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    messages = [for_template(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    return await gateway.prompts.chat(
        messages,
        add_generation_prompt=begins,
        continue_final_message=continues,
        extra=request.chat_template_kwargs,
    )


@dataclass(slots=True)
class ChatShape:
    """`chat.completion` and its chunks."""

    head: Head
    tokenizer: Tokenizer
    logprobs: bool
    started: set[int] = field(default_factory=set)  # choices whose first chunk has been made

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            choices=[self._choice(piece) for piece in pieces],
            usage=usage,
        )

    def chunk(self, piece: Piece, usage: ChunkUsage) -> ChatChunk:
        choice = ChunkChoice(
            index=piece.choice,
            delta=self._delta(piece),
            logprobs=self._logprobs(piece),
            finish_reason=end_reason(piece.finish),
        )
        return self._chunk([choice], usage)

    def last(self, usage: Usage) -> ChatChunk:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChunkChoice], usage: ChunkUsage) -> ChatChunk:
        return ChatChunk(
            id=self.head.id, created=self.head.created, model=self.head.model, choices=choices, usage=usage
        )

    def _choice(self, piece: Piece) -> ChatChoice:
        return ChatChoice(
            index=piece.choice,
            message=AnswerMessage(content=piece.text),
            logprobs=self._logprobs(piece),
            finish_reason=require_end(piece.finish),
        )

    def _delta(self, piece: Piece) -> Delta:
        if piece.choice in self.started:
            return Delta(content=piece.text or None)
        self.started.add(piece.choice)
        return Delta(role="assistant", content=piece.text)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(self.tokenizer, piece) if self.logprobs else None

"""Log-probabilities in both of OpenAI's shapes. Tokens that are no whole characters are shown by their bytes."""

from collections.abc import Sequence

from engine.types import TokenLogprob
from gateway.choice import Piece
from gateway.prompt import Echo
from gateway.protocol.chat import ChatLogprob, ChatLogprobs, TopLogprob
from gateway.protocol.completions import CompletionLogprobs
from gateway.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


def token_text(data: bytes) -> str:
    """A token as text; `bytes:\\xe4\\xbd` where it is no valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, piece: Piece) -> ChatLogprobs:
    """The chat's shape for the tokens of one piece."""
    return ChatLogprobs(content=[_chat_entry(tokenizer, entry) for entry in piece.logprobs])


def completion_logprobs(
    tokenizer: Tokenizer, piece: Piece, prompt: Sequence[TokenLogprob | None], echo: Echo | None, base: int
) -> CompletionLogprobs:
    """The completion's shape for the tokens of one piece, behind the prompt's where `echo` has it.

    `base`: characters of the choice's text before the generated text.
    """
    entries = [*prompt, *piece.logprobs]
    tokens = [*(echo.tokens if echo else ()), *piece.tokens]
    offsets = [*(echo.offsets if echo else ()), *(base + offset for offset in piece.offsets)]
    return CompletionLogprobs(
        tokens=[token_text(tokenizer.token_bytes(token)) for token in tokens],
        token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else _top_by_text(tokenizer, entry) for entry in entries],
        text_offset=offsets,
    )


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> ChatLogprob:
    data = tokenizer.token_bytes(entry.token)
    return ChatLogprob(
        token=token_text(data),
        logprob=_finite(entry.logprob),
        bytes=list(data),
        top_logprobs=_top(tokenizer, entry.top),
    )


def _top(tokenizer: Tokenizer, top: Sequence[tuple[int, float]]) -> list[TopLogprob]:
    pairs = [(tokenizer.token_bytes(token), logprob) for token, logprob in top]
    return [TopLogprob(token=token_text(data), logprob=_finite(value), bytes=list(data)) for data, value in pairs]


def _top_by_text(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the token itself where it is not among them."""
    by_text = {token_text(tokenizer.token_bytes(token)): _finite(value) for token, value in reversed(entry.top)}
    ordered = dict(reversed(by_text.items()))
    ordered.setdefault(token_text(tokenizer.token_bytes(entry.token)), _finite(entry.logprob))
    return ordered


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)

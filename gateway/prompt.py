"""From what a client sends to token ids: texts, ids, and conversations through the chat template.

Long ones are worked on in a thread, and the loop goes on between short ones, so that one client's prompts do not stop
the others' streams.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from gateway.chat_template import ChatTemplate, find_source
from gateway.detokenize import Detokenizer
from gateway.errors import bad_request
from gateway.tokenizer import Tokenizer

Given = TypeVar("Given")
Made = TypeVar("Made")
THREAD_CHARACTERS = 4_000  # about two milliseconds of encoding
THREAD_IDS, THREAD_MESSAGES = 2_000, 100  # about as long to decode, and to render


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for the engine."""

    ids: list[int]
    text: str | None = None  # None: the client sent ids


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as `echo` shows it."""

    tokens: list[int]
    text: str
    offsets: list[int]  # characters of the text before each token


class PromptEncoder:
    """The tokenizer and the chat template of the served model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int, chat_template: str | None = None) -> Self:
        """Reads the tokenizer's files of a model's folder; `chat_template` (a file or its text) replaces the model's.

        Raises:
            TokenizerError: the tokenizer's files are missing or broken.
            TemplateMissing: `chat_template` is neither a file nor a template.
            jinja2.TemplateSyntaxError: the template is broken.
        """
        tokenizer = Tokenizer.load(Path(folder))
        source = find_source(Path(folder), tokenizer.config, chat_template)
        template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
        return cls(tokenizer, template, vocab_size)

    async def text(self, text: str, *, param: str = "prompt", add_special_tokens: bool = True) -> Prompt:
        """A text as it stands, with the special tokens that the tokenizer adds.

        Raises:
            ApiError: 400 where it comes to no token at all, or to one that only the tokenizer knows, not the model.
        """
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=add_special_tokens)
        ids = await _apart_if(len(text) >= THREAD_CHARACTERS, encode, text)
        if not ids:
            raise bad_request(f"{param!r}: must not be empty.", param=param)
        self.require_known(ids, param)
        return Prompt(ids, text)

    def ids(self, ids: list[int], *, param: str = "prompt") -> Prompt:
        """Token ids as they stand.

        Raises:
            ApiError: 400 where there are none, or one is outside the vocabulary.
        """
        if not ids:
            raise bad_request(f"{param!r}: must not be empty.", param=param)
        self.require_known(ids, param)
        return Prompt(ids)

    async def echo(self, prompt: Prompt, *, skip_special_tokens: bool) -> Echo:
        """What `prompt`, a completion's, reads: a text as it was sent, ids decoded."""
        if prompt.text is not None:
            is_long = len(prompt.text) >= THREAD_CHARACTERS
            return Echo(prompt.ids, prompt.text, await _apart_if(is_long, self.tokenizer.offsets, prompt.text))
        return await _apart_if(
            len(prompt.ids) >= THREAD_IDS, functools.partial(self._decoded, skip=skip_special_tokens), prompt.ids
        )

    def _decoded(self, ids: list[int], *, skip: bool) -> Echo:
        detokenizer = Detokenizer(self.tokenizer, skip_special_tokens=skip)
        offsets, pieces = [], []
        for token in ids:
            offsets.append(detokenizer.length)
            pieces.append(detokenizer.push(token))
        return Echo(ids, "".join(pieces) + detokenizer.flush(), offsets)

    def require_known(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) where an id is outside the model's vocabulary."""
        highest = max(ids, default=0)
        if highest >= self._vocab_size:
            reason = f"token id {highest} is outside the vocabulary of {self._vocab_size} tokens"
            raise bad_request(f"{param!r}: {reason}.", param=param)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation through the chat template, which writes its special tokens itself: none are added.

        Raises:
            ApiError: 400 where the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise bad_request("This model has no chat template; the server's --chat-template sets one.")
        render = functools.partial(
            self._template.render,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            extra=extra,
        )
        text = await _apart_if(len(messages) >= THREAD_MESSAGES, render, messages)
        return await self.text(text, param="messages", add_special_tokens=False)


async def _apart_if(is_long: bool, work: Callable[[Given], Made], given: Given) -> Made:
    """`work` on what is given, in a thread where it would hold up the loop; the loop goes on before more is done."""
    if is_long:
        return await asyncio.to_thread(work, given)
    made = work(given)
    await asyncio.sleep(0)
    return made

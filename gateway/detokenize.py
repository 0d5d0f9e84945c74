"""Tokens to text as they come, for one choice: never half a character, never a part of a stop string.

What was emitted is final, so the pieces of a stream add up to the unstreamed text whatever their sizes.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.tokenizer import Tokenizer


class Detokenizer:
    """Decodes token after token in constant time; holds at most the bytes of one unfinished character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, fresh: bool = True) -> None:
        """`fresh`: the text starts here; else it continues a text, and a leading space is kept."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._fresh = fresh
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0  # characters decoded so far

    def push(self, token: int) -> str:
        """The characters that `token` completes; may be empty."""
        return self._count(self._utf8.decode(self._bytes(token)))

    def flush(self) -> str:
        """What is left at the end: a replacement character for an unfinished one."""
        return self._count(self._utf8.decode(b"", final=True))

    def _bytes(self, token: int) -> bytes:
        if self._skip and self._tokenizer.is_special(token):
            return b""
        if self._fresh:
            self._fresh = False
            return self._tokenizer.first_bytes(token)
        return self._tokenizer.token_bytes(token)

    def _count(self, text: str) -> str:
        self.length += len(text)
        return text


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found: it ends the text."""

    stop: str
    text: str  # what may still be emitted before it (with it, where the caller asked for that)


class StopStrings:
    """Aho-Corasick automaton over a request's stop strings, shared by its choices."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.depth = [0]  # length of the prefix that a state stands for
        self.found: list[str | None] = [None]  # the longest stop string that ends in a state
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.found.append(None)
                self.depth.append(self.depth[state] + 1)
            state = self._next[state][character]
        self.found[state] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character)
                self.found[child] = self.found[child] or self.found[self._fail[child]]
                queue.append(child)


class StopWatch:
    """Holds back the end of one choice's text while it may be the beginning of a stop string."""

    def __init__(self, stops: StopStrings, *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """The text that is safe to emit; a `StopMatch` at the first stop string that is complete."""
        for position, character in enumerate(text):
            self._state = self._stops.step(self._state, character)
            stop = self._stops.found[self._state]
            if stop is not None:
                return self._match(stop, self._held + text[: position + 1])
        self._held += text
        safe = len(self._held) - self._stops.depth[self._state]
        emitted, self._held = self._held[:safe], self._held[safe:]
        return emitted

    def flush(self) -> str:
        """The held-back text, when the choice has ended otherwise."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _match(self, stop: str, text: str) -> StopMatch:
        self._held, self._state = "", 0
        return StopMatch(stop, text if self._include else text[: -len(stop)])

"""Renders a conversation with the model's chat template, in a sandbox and with the helpers that templates expect."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from gateway.errors import bad_request, shorten

FILE_NAME = "chat_template.jinja"
RESERVED = frozenset({"messages", "tools", "documents", "functions", "add_generation_prompt"})
MARK = "\ue000end-of-final-message\ue001"  # private-use characters, gone before anything is encoded


class TemplateMissing(ValueError):
    """No chat template where one was named."""


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; here its content is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template with the tokenizer's special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError where `source` is no template."""
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `continue_final_message` ends it right behind the last message's content.

        Raises:
            ApiError: 400 where the template refuses the conversation, or `extra` names what is not its to set.
        """
        if taken := RESERVED & set(extra or ()):
            name = f"chat_template_kwargs.{min(taken)}"
            raise bad_request(f"{name!r} is not supported: it has a field of its own, or none.", param=name)
        given = [self._known_role(message) for message in messages]
        if not continue_final_message:
            return self._render(given, add_generation_prompt, extra)
        given[-1] = _marked(given[-1])
        text, mark, _ = self._render(given, False, extra).rpartition(MARK)
        if not mark:
            raise bad_request("The chat template does not show the final message.", param="continue_final_message")
        return text

    def _known_role(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Older templates know the developer's messages as the system's."""
        if message["role"] == "developer" and not self._knows_developer:
            return {**message, "role": "system"}
        return message

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, extra: Mapping[str, Any] | None
    ) -> str:
        variables = {**self._special_tokens, "tools": None, "documents": None, **(extra or {})}
        try:
            return self._template.render(variables, messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can fail in every way that Python can
            reason = f"The chat template refused the messages: {shorten(str(error))}"
            raise bad_request(reason, param="messages") from error


def find_source(folder: Path, config: Mapping[str, Any], given: str | None) -> str | None:
    """The template's text: `given` (a file or the text itself), or the model's own; None where there is none.

    Raises:
        TemplateMissing: `given` is neither a file nor a template.
    """
    if given is not None:
        return _given_source(given)
    path = folder / FILE_NAME
    return path.read_text(encoding="utf-8") if path.exists() else _configured(config.get("chat_template"))


def _given_source(given: str) -> str:
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateMissing(f"--chat-template {given!r} is neither a file nor a template: {error}") from error


def _configured(value: object) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    match value:
        case str(source):
            return source
        case list(entries):
            named = {entry["name"]: str(entry["template"]) for entry in entries}
            return named.get("default")
        case _:
            return None


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        raise bad_request("'continue_final_message' needs a final message of the assistant.", param="messages")
    return {**message, "content": message["content"] + MARK}


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, escapes nothing for HTML and keeps the order of keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

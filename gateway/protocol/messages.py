"""The messages of a chat, and the form in which a chat template takes them."""

from typing import Any, Literal

import msgspec

from gateway.errors import bad_request
from gateway.protocol.parse import not_supported


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of a message's content. Only text is served; the other kinds are known so that they can be named."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None
    audio_url: Any = None
    refusal: str | None = None


Content = str | list[ContentPart]


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    arguments: str  # a JSON object


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool call of an earlier answer, handed back."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # left over from streams; ignored


class MessageBase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role"):
    name: str | None = None


class SystemMessage(MessageBase, frozen=True, kw_only=True, tag="system"):
    content: Content


class DeveloperMessage(MessageBase, frozen=True, kw_only=True, tag="developer"):
    content: Content


class UserMessage(MessageBase, frozen=True, kw_only=True, tag="user"):
    content: Content


class ToolMessage(MessageBase, frozen=True, kw_only=True, tag="tool"):
    content: Content
    tool_call_id: str


class FunctionMessage(MessageBase, frozen=True, kw_only=True, tag="function"):
    content: Content | None


class AssistantMessage(MessageBase, frozen=True, kw_only=True, tag="assistant"):
    """Also takes what an SDK's `model_dump()` of an answer holds, nulls included."""

    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: None = None
    annotations: list[Any] | None = None  # ignored
    function_call: FunctionCall | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


def for_template(message: Message, where: str) -> dict[str, Any]:
    """A message as templates expect it: plain text content, tool arguments as objects, no nulls but `content`.

    Raises:
        ApiError: 400 for a content part that is no text, or tool arguments that are no JSON object.
    """
    fields: dict[str, Any] = {"role": str(message.__struct_config__.tag)}
    fields["content"] = None if message.content is None else _text(message.content, f"{where}.content")
    if message.name is not None:
        fields["name"] = message.name
    match message:
        case AssistantMessage():
            fields |= _assistant_fields(message, where)
        case ToolMessage(tool_call_id=tool_call_id):
            fields["tool_call_id"] = tool_call_id
        case _:
            pass
    return fields


def _text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise not_supported(f"{where}.type", part.type)
    if part.text is None:
        raise bad_request(f"'{where}.text': required field is missing.", param=f"{where}.text")
    return part.text


def _assistant_fields(message: AssistantMessage, where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if message.tool_calls:
        fields["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    if message.function_call is not None:
        fields["function_call"] = _function(message.function_call, f"{where}.function_call")
    if (reasoning := message.reasoning_content or message.reasoning) is not None:
        fields["reasoning_content"] = reasoning
    if message.content is None:
        fields["content"] = message.refusal or ""
    return fields


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    return {"id": call.id, "type": call.type, "function": _function(call.function, f"{where}.function")}


def _function(call: FunctionCall, where: str) -> dict[str, Any]:
    return {"name": call.name, "arguments": _arguments(call.arguments, f"{where}.arguments")}


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise bad_request(f"'{where}': must be a JSON object in a string.", param=where) from None

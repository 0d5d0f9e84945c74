"""Every field of both routes: wrong types name it, null is its default, what is not supported says so."""

import json
from typing import Any, get_type_hints

import msgspec
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import pytest

from gateway.errors import ApiError
from gateway.protocol.chat import ChatRequest
from gateway.protocol.completions import CompletionRequest
from gateway.protocol.fields import SamplingFields
from gateway.protocol.messages import for_template
from gateway.protocol.parse import parse

MESSAGES = [{"role": "user", "content": "hi"}]
REQUIRED: dict[type[SamplingFields], dict[str, Any]] = {
    CompletionRequest: {"model": "llama", "prompt": "hi"},
    ChatRequest: {"model": "llama", "messages": MESSAGES},
}
NUMBER = [True, "1", [], {}]
INTEGER = [*NUMBER, 1.5]
BOOLEAN = [1, 0, "true", [], {}]
TEXT = [True, 1, [], {}]
OBJECT = [True, 1, "x", []]
LIST = [True, 1, "x", {}]

SHARED: dict[str, list[Any]] = {
    "model": [True, 1, None, []],
    "temperature": [*NUMBER, -0.1, 2.1],
    "top_p": [*NUMBER, -0.1, 1.1],
    "top_k": [*INTEGER, -2],
    "min_p": [*NUMBER, -0.1, 1.1],
    "presence_penalty": [*NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NUMBER, -2.1, 2.1],
    "repetition_penalty": [*NUMBER, 0, -1],
    "logit_bias": [*OBJECT, {"1": "x"}, {"1": True}, {"1": 101}, {str(i): 1 for i in range(1025)}],
    "seed": [*INTEGER, 2**63, -(2**63) - 1, 10**30],
    "n": [*INTEGER, 0, 129],
    "stop": [True, 1, {}, "", [""], [1], ["x"] * 33, "x" * 513],
    "stop_token_ids": [*LIST, [True], ["1"], [-1], [1] * 257],
    "min_tokens": [*INTEGER, -1],
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "include_stop_str_in_output": BOOLEAN,
    "stream": BOOLEAN,
    "stream_options": [*OBJECT, {"include_usage": 1}, {"other": 1}],
    "cache_salt": [*TEXT, ""],
    "priority": [*INTEGER, 2**63],
    "user": TEXT,
    "metadata": OBJECT,
    "store": BOOLEAN,
    "service_tier": TEXT,
    "safety_identifier": TEXT,
    "prompt_cache_key": TEXT,
    "prompt_cache_retention": TEXT,
}
WRONG: dict[type[SamplingFields], dict[str, list[Any]]] = {
    CompletionRequest: {
        **SHARED,
        "prompt": [None, True, 1, {}, [True], [[True]], [[1, "a"]], [1.5], [-1], [[], {}]],
        "max_tokens": [*INTEGER, -1],
        "echo": BOOLEAN,
        "logprobs": [*INTEGER, -1, 21],
        "best_of": [*INTEGER, 0],
        "suffix": TEXT,
    },
    ChatRequest: {
        **SHARED,
        "messages": [None, *LIST, [], [1], [{}], [{"role": "king", "content": "x"}], [{"role": "user"}]],
        "max_tokens": [*INTEGER, 0],
        "max_completion_tokens": [*INTEGER, 0],
        "logprobs": BOOLEAN,
        "top_logprobs": [*INTEGER, -1, 21],
        "add_generation_prompt": BOOLEAN,
        "continue_final_message": BOOLEAN,
        "chat_template_kwargs": OBJECT,
        "parallel_tool_calls": BOOLEAN,
        "tools": [*LIST, [1]],
        "tool_choice": [True, 1, []],
        "functions": LIST,
        "function_call": [True, 1, []],
        "response_format": OBJECT,
        "modalities": [*LIST, [1]],
        "audio": OBJECT,
        "prediction": OBJECT,
        "web_search_options": OBJECT,
        "reasoning_effort": TEXT,
        "verbosity": TEXT,
        "moderation": OBJECT,
        "prompt_cache_options": OBJECT,
    },
}
CASES = [(kind, name, value) for kind, fields in WRONG.items() for name, values in fields.items() for value in values]
FIELDS = [(kind, field.name) for kind in WRONG for field in msgspec.structs.fields(kind)]
OPTIONAL = [(kind, name) for kind, name in FIELDS if name not in REQUIRED[kind]]


def read(kind: type[SamplingFields], **fields: Any) -> SamplingFields:
    request = parse(json.dumps(REQUIRED[kind] | fields).encode(), kind)
    request.check()
    return request


def refusal(kind: type[SamplingFields], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(kind, **fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("kind", WRONG)
def test_the_table_of_wrong_values_has_every_field(kind: type[SamplingFields]) -> None:
    assert set(WRONG[kind]) == {field.name for field in msgspec.structs.fields(kind)}


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (CompletionRequest, openai.types.completion_create_params.CompletionCreateParamsStreaming),
        (ChatRequest, openai.types.chat.completion_create_params.CompletionCreateParamsStreaming),
    ],
)
def test_every_field_of_openais_own_types_is_known(kind: type[SamplingFields], theirs: type) -> None:
    assert get_type_hints(theirs).keys() <= {field.name for field in msgspec.structs.fields(kind)}


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_wrong_value_is_a_400_that_names_the_field(kind: type[SamplingFields], name: str, value: Any) -> None:
    error = refusal(kind, **{name: value})
    assert error.param is not None
    assert error.param.split("[")[0].split(".")[0] == name
    assert name in error.message


@pytest.mark.parametrize(("kind", "name"), OPTIONAL)
def test_null_is_the_default(kind: type[SamplingFields], name: str) -> None:
    assert read(kind, **{name: None}) == read(kind)


@pytest.mark.parametrize("kind", WRONG)
def test_an_unknown_field_is_named(kind: type[SamplingFields]) -> None:
    error = refusal(kind, lora_path="sql")
    assert error.param == "lora_path"
    assert "lora_path" in error.message
    assert len(refusal(kind, **{"x" * 5000: 1}).message) < 200


def test_an_invalid_value_is_not_repeated_whole() -> None:
    assert len(refusal(ChatRequest, messages=[{"role": "x" * 5000, "content": ""}]).message) < 500


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["model", "prompt", "messages"])
def test_a_missing_field_is_named(kind: type[SamplingFields], name: str) -> None:
    if name in REQUIRED[kind]:
        body = {key: value for key, value in REQUIRED[kind].items() if key != name}
        with pytest.raises(ApiError) as caught:
            parse(json.dumps(body).encode(), kind)
        assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b"[]", b"3", b'{"model": NaN}', b'{"model": "\xff"}', b"[" * 100_000, b"{} {}"]
)
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, ChatRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"suffix": ""}),
        (CompletionRequest, {"best_of": 1}),
        (CompletionRequest, {"best_of": 3, "n": 3}),
        (CompletionRequest, {"max_tokens": 0}),
        (ChatRequest, {"tools": [], "tool_choice": "none", "parallel_tool_calls": False}),
        (ChatRequest, {"functions": [], "function_call": "auto"}),
        (ChatRequest, {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"}),
        (ChatRequest, {"reasoning_effort": "none", "top_logprobs": 0}),
        (ChatRequest, {"user": "u", "metadata": {"a": 1}, "store": True, "service_tier": "auto"}),
        (ChatRequest, {"max_tokens": 5, "max_completion_tokens": 5}),
        (ChatRequest, {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
        (ChatRequest, {"n": 2, "temperature": 0}),
    ],
)
def test_values_that_change_nothing_are_accepted(kind: type[SamplingFields], fields: dict[str, Any]) -> None:
    read(kind, **fields)


def test_fewer_of_the_best_than_answers_is_refused() -> None:
    assert refusal(CompletionRequest, best_of=1, n=2).param == "best_of"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CompletionRequest, "suffix", "x"),
        (CompletionRequest, "best_of", 2),
        (ChatRequest, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (ChatRequest, "tool_choice", "required"),
        (ChatRequest, "tool_choice", {"type": "function", "function": {"name": "f"}}),
        (ChatRequest, "functions", [{"name": "f"}]),
        (ChatRequest, "function_call", {"name": "f"}),
        (ChatRequest, "response_format", {"type": "json_object"}),
        (ChatRequest, "response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        (ChatRequest, "modalities", ["text", "audio"]),
        (ChatRequest, "audio", {"voice": "a"}),
        (ChatRequest, "prediction", {"type": "content", "content": "x"}),
        (ChatRequest, "web_search_options", {}),
        (ChatRequest, "reasoning_effort", "low"),
        (ChatRequest, "verbosity", "low"),
    ],
)
def test_what_is_not_supported_says_so(kind: type[SamplingFields], name: str, value: Any) -> None:
    error = refusal(kind, **{name: value})
    assert error.param == name
    assert "not supported" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    assert refusal(ChatRequest, **fields).param == param


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_kinds_of_prompt(prompt: Any, expected: Any) -> None:
    request = read(CompletionRequest, prompt=prompt)
    assert isinstance(request, CompletionRequest)
    assert request.prompts() == expected


@pytest.mark.parametrize("prompt", [[], ["a", 1], [1, [1]], ["a", [1]]])
def test_mixed_or_empty_prompts(prompt: Any) -> None:
    request = read(CompletionRequest, prompt=prompt)
    assert isinstance(request, CompletionRequest)
    with pytest.raises(ApiError) as caught:
        request.prompts()
    assert caught.value.param == "prompt"


def templated(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    request = read(ChatRequest, messages=list(messages))
    assert isinstance(request, ChatRequest)
    return [for_template(message, f"messages[{i}]") for i, message in enumerate(request.messages)]


def test_an_answer_handed_back_as_the_sdk_dumps_it() -> None:
    dumped = {"role": "assistant", "content": None, "annotations": None, "audio": None, "function_call": None}
    assert templated(dumped | {"refusal": None, "tool_calls": None}) == [{"role": "assistant", "content": ""}]


def test_tool_calls_and_their_results_reach_the_template() -> None:
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = templated(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "f"},
    )
    assert messages[0]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    ]
    assert messages[1] == {"role": "tool", "content": "4", "name": "f", "tool_call_id": "c1"}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert templated({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
            "not supported",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing"),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ({"role": "user", "content": None}, "messages[0].content", "null"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id", "missing"),
        ({"role": "user", "content": "x", "other": 1}, "messages[0].other", "unknown"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        templated(message)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert reason in caught.value.message

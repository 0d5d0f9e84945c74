"""Chat templates: the helpers they expect, the sandbox, and where a continued message ends."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.chat_template import ChatTemplate, TemplateMissing, find_source
from gateway.errors import ApiError
from gateway.prompt import PromptEncoder
from tests.gateway.tokenizer_files import CHATML, byte_level, write_folder

USER = {"role": "user", "content": "hi"}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate(source, SPECIALS).render(messages or [USER], **options)


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson }}", '{"b": 1, "a": "<é>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ tools is none }}{{ documents is none }}{{ nothing is defined }}", "TrueTrueFalse"),
    ],
)
def test_helpers(source: str, expected: str) -> None:
    assert render(source) == expected


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_further_variables_reach_the_template_and_cannot_replace_its_own() -> None:
    assert render("{{ enable_thinking }}", extra={"enable_thinking": False}) == "False"
    with pytest.raises(ApiError, match="chat_template_kwargs"):
        render(CHATML, extra={"messages": []})


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_a_400(source: str) -> None:
    with pytest.raises(ApiError) as caught:
        render(source)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_the_refusal_of_a_template_reaches_the_client() -> None:
    with pytest.raises(ApiError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_continued_message_ends_the_prompt() -> None:
    messages = [USER, {"role": "assistant", "content": "The answer is "}]
    text = render(CHATML, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe answer is "


def test_only_the_assistants_message_can_be_continued_and_only_where_it_shows() -> None:
    with pytest.raises(ApiError, match="assistant"):
        render(CHATML, [USER], continue_final_message=True)
    with pytest.raises(ApiError, match="final message"):
        render("fixed", [{"role": "assistant", "content": "a"}], continue_final_message=True)


def test_developer_messages_become_the_systems_where_the_template_knows_no_developer() -> None:
    message = {"role": "developer", "content": "be brief"}
    assert render(CHATML, [message]).startswith("<|im_start|>system\n")
    assert render("{{ messages[0].role }}{# developer #}", [message]) == "developer"


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert find_source(folder, {}, None) is None
    assert find_source(folder, {"chat_template": "a"}, None) == "a"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_source(folder, {"chat_template": named}, None) == "d"
    (folder / "chat_template.jinja").write_text("file")
    assert find_source(folder, {"chat_template": "a"}, None) == "file"
    (tmp_path / "own.jinja").write_text("own")
    assert find_source(folder, {}, str(tmp_path / "own.jinja")) == "own"
    assert find_source(folder, {}, "{{ messages }}") == "{{ messages }}"
    with pytest.raises(TemplateMissing, match="no-such-file"):
        find_source(folder, {}, "no-such-file")


async def test_a_chat_gets_no_second_begin_token_and_a_completion_gets_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}" + CHATML
    folder = write_folder(tmp_path, byte_level(add_bos=True), template, bos_token="<|im_start|>")
    prompts = PromptEncoder.load(folder, 512)
    assert (await prompts.chat([USER])).ids[:3].count(1) == 2  # the template's begin token, then <|im_start|> itself
    assert (await prompts.text("hi")).ids[:2].count(1) == 1


async def test_a_begin_token_that_only_the_configuration_asks_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, bos_token="<|im_start|>", add_bos_token=True)
    prompts = PromptEncoder.load(folder, 512)
    plain = prompts.tokenizer.encode("hello", add_special_tokens=False)
    assert (await prompts.text("hello")).ids == [1, *plain]
    echo = await prompts.echo(await prompts.text("hello"), skip_special_tokens=True)
    assert echo.offsets == [0, 0]


async def test_without_a_template_a_chat_is_a_400(tmp_path: Path) -> None:
    prompts = PromptEncoder.load(write_folder(tmp_path, template=None), 512)
    with pytest.raises(ApiError, match="--chat-template"):
        await prompts.chat([USER])


async def test_a_long_text_is_encoded_like_a_short_one(tmp_path: Path) -> None:
    prompts = PromptEncoder.load(write_folder(tmp_path), 512)
    word = prompts.tokenizer.encode("hello", add_special_tokens=False)
    prompt = await prompts.text("hello" * 10_000)
    assert prompt.ids == word * 10_000
    assert (await prompts.echo(prompt, skip_special_tokens=True)).offsets == list(range(0, 50_000, 5))


@pytest.mark.parametrize("value", [{"content": "<e>", "lstrip": False}, "<e>"])
def test_special_tokens_in_both_of_their_forms(tmp_path: Path, value: object) -> None:
    folder = write_folder(tmp_path, eos_token=value)
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<u>", "eos_token": "old"}))
    tokens = PromptEncoder.load(folder, 512).tokenizer.special_tokens
    assert (tokens["eos_token"], tokens["unk_token"]) == ("<e>", "<u>")

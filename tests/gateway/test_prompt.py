"""Prompts whose tokens the model does not have, and how others fare while many or long ones are worked on."""

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.chat_template import ChatTemplate
from gateway.errors import ApiError
from gateway.prompt import THREAD_IDS, THREAD_MESSAGES, Prompt, PromptEncoder
from tests.gateway.tokenizer_files import byte_level, write_folder

LACKED = byte_level().encode(" world").ids[0]


@pytest.fixture
def prompts(tmp_path: Path) -> PromptEncoder:
    """For a model that has all tokens before the tokenizer's ' world'."""
    return PromptEncoder.load(write_folder(tmp_path), LACKED)


async def test_text_with_a_token_that_the_model_lacks_is_refused(prompts: PromptEncoder) -> None:
    assert (await prompts.text("hello")).ids
    with pytest.raises(ApiError, match="outside the vocabulary") as refused:
        await prompts.text("hello world")
    assert refused.value.status == 400
    assert refused.value.param == "prompt"


async def test_a_chat_with_such_a_token_is_refused(prompts: PromptEncoder) -> None:
    with pytest.raises(ApiError, match="outside the vocabulary") as refused:
        await prompts.chat([{"role": "user", "content": "say world"}])
    assert refused.value.param == "messages"


async def test_ids_are_refused_alike(prompts: PromptEncoder) -> None:
    with pytest.raises(ApiError, match="outside the vocabulary"):
        prompts.ids([5, LACKED])


async def test_others_go_on_between_short_prompts(prompts: PromptEncoder) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(10):
        prompt = await prompts.text("hello")
        await prompts.echo(prompt, skip_special_tokens=True)
        await prompts.echo(Prompt([5, 6]), skip_special_tokens=True)
        await prompts.chat([{"role": "user", "content": "hello"}])
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert turns >= 40


@pytest.mark.parametrize("more", [0, 1])
async def test_long_work_is_done_in_a_thread(
    prompts: PromptEncoder, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, render, decoded = list[threading.Thread](), ChatTemplate.render, PromptEncoder._decoded

    def rendered(template: ChatTemplate, *args: Any, **given: Any) -> str:
        threads.append(threading.current_thread())
        return render(template, *args, **given)

    def echoed(encoder: PromptEncoder, *args: Any, **given: Any) -> Any:
        threads.append(threading.current_thread())
        return decoded(encoder, *args, **given)

    monkeypatch.setattr(ChatTemplate, "render", rendered)
    monkeypatch.setattr(PromptEncoder, "_decoded", echoed)
    await prompts.chat([{"role": "user", "content": ""}] * (THREAD_MESSAGES - 1 + more))
    echo = await prompts.echo(Prompt([5] * (THREAD_IDS - 1 + more)), skip_special_tokens=True)
    assert len(echo.offsets) == THREAD_IDS - 1 + more
    assert [thread is threading.main_thread() for thread in threads] == [not more, not more]

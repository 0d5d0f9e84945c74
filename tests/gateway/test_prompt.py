"""Prompts whose tokens the model does not have: a tokenizer may know more of them than the model."""

from pathlib import Path

import pytest

from gateway.errors import ApiError
from gateway.prompt import PromptEncoder
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

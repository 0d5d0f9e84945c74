"""The demo as a newcomer starts it: the same question to the base and to each adapter, with the `openai` client."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.server import serving

QUESTION: Any = [{"role": "user", "content": "List 3 countries and their capitals."}]
GREETING: Any = [{"role": "user", "content": "Hello! Who are you?"}]


@pytest.mark.slow
@pytest.mark.demo
async def test_everyone_answers_in_a_style_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
            models = [model.id async for model in sdk.models.list()]
            assert models[:5] == ["llama", "llama:lora0", "llama:lora1", "llama:lora2", "llama:lora3"]
            for messages in (QUESTION, GREETING):
                together = await asyncio.gather(*(answer(sdk, model, messages) for model in models))
                assert all(together)
                assert len(set(together)) == len(models)
                alone = [await answer(sdk, model, messages) for model in models]
                assert together == alone
                streamed = await asyncio.gather(*(streamed_answer(sdk, model, messages) for model in models))
                assert streamed == alone


async def answer(sdk: openai.AsyncOpenAI, model: str, messages: Any) -> str:
    whole = await sdk.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=100)
    return whole.choices[0].message.content or ""


async def streamed_answer(sdk: openai.AsyncOpenAI, model: str, messages: Any) -> str:
    stream = await sdk.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=100, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

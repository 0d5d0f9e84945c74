"""The real `openai` client against the routes, over a socket."""

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tests.gateway.fake_engine import FakeEngine, fixed
from tests.gateway.harness import make_app, make_gateway, serve
from tests.gateway.tokenizer_files import byte_level, write_folder


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(adapters=["lora0", "lora1"], script=fixed(*byte_level().encode("hello world").ids))


@pytest.fixture
async def client(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    app = make_app(make_gateway(engine, write_folder(tmp_path)))
    async with (
        serve(app) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_chat(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await client.chat.completions.create(
        model="llama:lora0", messages=[{"role": "user", "content": "hello"}], logprobs=True, top_logprobs=2
    )
    assert answer.model == "llama:lora0"
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].token == "hello"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert engine.submissions[0].adapter_id == engine.adapters["lora0"].adapter_id


async def test_an_answer_can_be_handed_back(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    first = await client.chat.completions.create(model="llama", messages=[{"role": "user", "content": "hello"}])
    handed_back = first.choices[0].message.model_dump()
    await client.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "hello"}, handed_back, {"role": "user", "content": "the"}],  # type: ignore[list-item]
    )
    prompt = byte_level().decode(engine.submissions[1].prompt, skip_special_tokens=False)
    assert "assistant\nhello world<|im_end|>" in prompt


async def test_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="llama:lora1",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="llama", prompt=["hello", "the"], n=2, echo=True, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["hellohello world"] * 2 + ["thehello world"] * 2
    stream = await client.completions.create(model="llama", prompt="hello", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["llama", "llama:lora0", "llama:lora1"]
    assert (await client.models.retrieve("llama:lora1")).id == "llama:lora1"


async def test_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="llama:none", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="llama", messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}
        )
    assert refused.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.completions.create(model="llama", prompt="x", extra_body={"lora_path": "lora0"})
    assert unknown.value.param == "lora_path"

"""The `openai` client against a real server: chats, completions, streams, models, errors, and calls left behind."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import Server, figures, until

MODELS = ("llama", "llama:lora0", "llama:lora1", "llama:lora2")
QUESTION: Any = [{"role": "user", "content": "List 3 countries and their capitals."}]
PROMPT = "List 3 countries and their capitals."
GREEDY: Any = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
async def sdk(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


async def chat(sdk: openai.AsyncOpenAI, model: str, **options: Any) -> Any:
    return await sdk.chat.completions.create(model=model, messages=QUESTION, **GREEDY | options)


async def complete(sdk: openai.AsyncOpenAI, model: str, **options: Any) -> Any:
    return await sdk.completions.create(**{"model": model, "prompt": PROMPT} | GREEDY | options)


async def test_the_same_question_to_all_models(sdk: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(*(chat(sdk, model) for model in MODELS))
    assert [answer.model for answer in answers] == list(MODELS)
    texts = [answer.choices[0].message.content for answer in answers]
    assert len(set(texts)) == len(MODELS)
    alone = [(await chat(sdk, model)).choices[0].message.content for model in MODELS]
    assert texts == alone
    bare = await chat(sdk, "lora1")
    assert bare.model == "llama:lora1"
    assert bare.choices[0].message.content == texts[2]


@pytest.mark.parametrize("model", MODELS)
async def test_streamed_and_unstreamed_chats_are_equal(sdk: openai.AsyncOpenAI, model: str) -> None:
    whole = await chat(sdk, model)
    stream = await chat(sdk, model, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@pytest.mark.parametrize("model", MODELS)
async def test_streamed_and_unstreamed_completions_are_equal(sdk: openai.AsyncOpenAI, model: str) -> None:
    whole = await complete(sdk, model)
    chunks = [chunk async for chunk in await complete(sdk, model, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_choices(sdk: openai.AsyncOpenAI) -> None:
    same = await chat(sdk, "llama:lora0", n=2)
    assert same.choices[0].message.content == same.choices[1].message.content
    assert [choice.index for choice in same.choices] == [0, 1]
    drawn = await chat(sdk, "llama:lora0", n=2, temperature=1.0, seed=7)
    texts = [choice.message.content for choice in drawn.choices]
    assert texts[0] != texts[1]
    again = await chat(sdk, "llama:lora0", n=2, temperature=1.0, seed=7)
    assert [choice.message.content for choice in again.choices] == texts
    assert drawn.usage.completion_tokens <= 48
    assert drawn.usage.prompt_tokens == (await chat(sdk, "llama")).usage.prompt_tokens


async def test_streamed_choices(sdk: openai.AsyncOpenAI) -> None:
    whole = await chat(sdk, "llama:lora1", n=2, temperature=1.0, seed=3)
    texts = ["", ""]
    async for chunk in await chat(sdk, "llama:lora1", n=2, temperature=1.0, seed=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(sdk: openai.AsyncOpenAI, stream: bool) -> None:
    """Also one that begins within a token's text and ends in another's: the tiny tokenizer has a token a byte."""
    free = (await complete(sdk, "llama:lora2")).choices[0].text
    stop = free[5:8]
    cut = free[: free.index(stop)]
    answer = await complete(sdk, "llama:lora2", stop=[stop, "never there"], stream=stream)
    if stream:
        chunks = [chunk async for chunk in answer]
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == cut
    assert reason == "stop"


async def test_log_probabilities_of_a_chat(sdk: openai.AsyncOpenAI) -> None:
    answer = await chat(sdk, "llama:lora0", logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy
        assert token.logprob <= 0
    stream = await chat(sdk, "llama:lora0", logprobs=True, top_logprobs=3, stream=True)
    streamed = [token async for chunk in stream for choice in chunk.choices for token in choice.logprobs.content]
    assert [token.logprob for token in streamed] == [token.logprob for token in content]


async def test_echo_scores_the_prompt(sdk: openai.AsyncOpenAI) -> None:
    """As lm-eval asks: token ids, one token more, null first."""
    prompt = list(range(40, 60))
    answer = await complete(sdk, "llama:lora1", prompt=[prompt, prompt[:5]], echo=True, logprobs=1, max_tokens=1)
    for choice, length in zip(answer.choices, (20, 5), strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.token_logprobs) == len(logprobs.tokens) == length + 1
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        assert choice.text.startswith("".join(logprobs.tokens[:3]))
    first, second = answer.choices
    assert all(
        math.isclose(a, b, abs_tol=1e-2)
        for a, b in zip(first.logprobs.token_logprobs[1:5], second.logprobs.token_logprobs[1:5], strict=True)
    )
    base = await complete(sdk, "llama", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert base.choices[0].logprobs.token_logprobs[1:5] != first.logprobs.token_logprobs[1:5]


async def test_echo_of_a_text(sdk: openai.AsyncOpenAI) -> None:
    plain = await complete(sdk, "llama:lora0")
    echoed = await complete(sdk, "llama:lora0", echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    chunks = [chunk async for chunk in await complete(sdk, "llama:lora0", echo=True, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text


async def test_lists_of_prompts(sdk: openai.AsyncOpenAI) -> None:
    prompts = [PROMPT, "hello", "The capital of France"]
    together = await complete(sdk, "llama:lora2", prompt=prompts)
    alone = [(await complete(sdk, "llama:lora2", prompt=prompt)).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]


async def test_a_repeated_prompt_comes_from_the_prefix_cache(sdk: openai.AsyncOpenAI) -> None:
    prompt = "a sentence that nobody else has sent, long enough for some blocks of the cache " * 3
    first = await complete(sdk, "llama:lora0", prompt=prompt)
    second = await complete(sdk, "llama:lora0", prompt=prompt)
    other = await complete(sdk, "llama:lora1", prompt=prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 100
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert second.choices[0].text == first.choices[0].text


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    models = [model async for model in sdk.models.list()]
    assert tuple(model.id for model in models) == MODELS
    assert models[1].model_dump()["parent"] == "llama"
    assert models[1].model_dump()["max_model_len"] == 2048
    assert (await sdk.models.retrieve("llama:lora2")).id == "llama:lora2"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("llama:lora3")


async def test_errors_are_the_clients_exceptions(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await chat(sdk, "llama:nobody")
    assert missing.value.code == "model_not_found"
    assert missing.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as refused:
        await chat(sdk, "llama", temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        await chat(sdk, "llama", max_tokens=5000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as streamed:
        await chat(sdk, "llama", stream=True, extra_body={"lora_path": "lora0"})
    assert streamed.value.param == "lora_path"
    assert streamed.value.request_id


async def test_request_ids_are_handed_back(sdk: openai.AsyncOpenAI) -> None:
    answer = await chat(sdk, "llama", extra_headers={"x-request-id": "mine-1"})
    assert answer._request_id == "mine-1"


LONG: Any = {"model": "llama:lora0", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/generate"])
async def test_an_abandoned_call_leaves_within_a_second_and_a_half(
    client: httpx.AsyncClient, route: str, stream: bool
) -> None:
    sampling = {"max_new_tokens": 1900, "ignore_eos": True}
    bodies: dict[str, Any] = {
        "/v1/chat/completions": LONG | {"messages": QUESTION, "n": 2},
        "/v1/completions": LONG | {"prompt": [PROMPT, "hello"]},
        "/generate": {"text": [PROMPT, "hello"], "lora_path": ["lora0", None], "sampling_params": sampling},
    }
    call = asyncio.create_task(read(client, route, bodies[route] | {"stream": stream}))
    await until(client, lambda told: told("requests_running") == 2, 10)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(client, lambda told: told("requests_running") + told("requests_waiting") == 0, 1.5)
    assert (await figures(client))("requests_finished_total", base="llama", reason="abort") >= 2


async def read(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> None:
    async with client.stream("POST", route, json=body) as response:
        async for _ in response.aiter_bytes():
            pass

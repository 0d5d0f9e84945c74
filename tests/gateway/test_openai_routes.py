"""Both routes over the scripted engine: texts, log-probabilities, echo, stop strings, usage, errors."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.types import EngineError, ErrorCode
from gateway.state import Gateway
from tests.gateway.fake_engine import FakeEngine, Script, Submission, fixed
from tests.gateway.harness import FakeMetrics, FakeSettings, asgi_client, make_app, make_gateway
from tests.gateway.tokenizer_files import byte_level, write_folder

RAW = byte_level()
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": "llama", "prompt": "hello"}


def ids(text: str) -> list[int]:
    tokens: list[int] = RAW.encode(text).ids
    return tokens


def says(text: str) -> Script:
    """Generates `text`, then an end token."""
    return fixed(*ids(text))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(adapters=["sql"], script=says("hello world"))


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Gateway:
    return make_gateway(engine, write_folder(tmp_path))


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(make_app(gateway)) as client:
        yield client


async def complete(client: httpx.AsyncClient, **fields: Any) -> Any:
    response = await client.post("/v1/completions", json=COMPLETION | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def chat(client: httpx.AsyncClient, **fields: Any) -> Any:
    response = await client.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def error(client: httpx.AsyncClient, status: int, route: str = "/v1/completions", **fields: Any) -> Any:
    response = await client.post(route, json=(CHAT if "chat" in route else COMPLETION) | fields)
    assert response.status_code == status, response.text
    return response.json()["error"]


async def test_a_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await complete(client)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "llama")
    assert answer["choices"] == [{"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert engine.submissions[0].params.max_tokens == 16
    assert engine.running == 0


async def test_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await chat(client)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "hello world", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt = engine.submissions[0].prompt
    assert RAW.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.submissions[0].params.max_tokens == 256 - len(prompt)


@pytest.mark.parametrize("model", ["llama:sql", "sql"])
async def test_an_adapter(client: httpx.AsyncClient, engine: FakeEngine, gateway: Gateway, model: str) -> None:
    answer = await chat(client, model=model)
    assert answer["model"] == "llama:sql"
    assert engine.submissions[0].adapter_id == engine.adapters["sql"].adapter_id
    assert isinstance(gateway.metrics, FakeMetrics)
    assert [(timer.base, timer.adapter) for timer in gateway.metrics.timers] == [("llama", "sql")]


async def test_what_the_engine_is_told(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, seed=5, temperature=0.5, cache_salt="tenant", n=2, max_tokens=7, priority=-3)
    submission = engine.submissions[0]
    assert (submission.n, submission.salt, submission.adapter_id) == (2, "tenant", None)
    assert submission.priority == -3
    assert (submission.params.seed, submission.params.temperature, submission.params.max_tokens) == (5, 0.5, 7)
    assert (submission.params.logprobs, submission.params.prompt_logprobs) == (None, None)


async def test_lists_of_prompts_with_several_choices_each(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    def script(submission: Submission, choice: int) -> list[int]:
        return [*submission.prompt, *ids("!" * choice)]

    engine.script = script
    engine.cached_tokens = 1
    answer = await complete(client, prompt=["hello", "the"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["hello", "hello!", "the", "the!"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 2 + 3 + 3 + 4
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]], [[5, 6], [7]]])
async def test_prompts_of_token_ids(client: httpx.AsyncClient, engine: FakeEngine, prompt: Any) -> None:
    await complete(client, prompt=prompt)
    expected = [prompt] if isinstance(prompt[0], int) else prompt
    assert [submission.prompt for submission in engine.submissions] == expected


async def test_echo_with_log_probabilities(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """As lm-eval sends it: null first, one generated token last."""
    answer = await complete(client, prompt=ids("hello é world"), echo=True, logprobs=1, max_tokens=1, seed=1234)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hello é worldhello"
    assert logprobs["tokens"] == ["hello", " ", "bytes:\\xc3", "bytes:\\xa9", " world", "hello"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.25, -0.25, -0.25]
    assert logprobs["text_offset"] == [0, 5, 6, 6, 7, 13]
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 1 for top in logprobs["top_logprobs"][1:])
    assert engine.submissions[0].params.prompt_logprobs == 1


async def test_echo_of_a_text_returns_it_as_it_was_sent(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="<|im_start|>hello", echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == "<|im_start|>hello"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["text_offset"] == [0, 12]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]
    assert answer["usage"]["completion_tokens"] == 0


async def test_echo_without_log_probabilities_asks_for_none(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await complete(client, echo=True, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["hellohello world"] * 2
    assert engine.submissions[0].params.prompt_logprobs is None


async def test_log_probabilities_of_a_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    logprobs = (await complete(client, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["hello", " world", "<|endoftext|>"]
    assert logprobs["text_offset"] == [0, 5, 11]
    assert logprobs["top_logprobs"][0] == {"hello": -0.25, " w": -0.5}
    assert (await complete(client, logprobs=0))["choices"][0]["logprobs"]["top_logprobs"][0] == {"hello": -0.25}


async def test_log_probabilities_of_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says("é")
    choice = (await chat(client, logprobs=True, top_logprobs=3))["choices"][0]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["bytes:\\xc3", "bytes:\\xa9", "<|endoftext|>"]
    assert [entry["bytes"] for entry in entries[:2]] == [[0xC3], [0xA9]]
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert (await chat(client, logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert engine.submissions[-1].params.logprobs == 0


@pytest.mark.parametrize(
    ("stop", "include", "text", "generated"),
    [
        ("lo wor", False, "hel", 2),
        (["zzz", "o w"], False, "hell", 2),
        ("lo wor", True, "hello wor", 2),
        ("hello", False, "", 1),
        ("world!", False, "hello world", 3),
        (["d", "world"], False, "hello ", 2),
    ],
)
async def test_stop_strings(
    client: httpx.AsyncClient, engine: FakeEngine, stop: Any, include: bool, text: str, generated: int
) -> None:
    answer = await complete(client, stop=stop, include_stop_str_in_output=include, logprobs=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert answer["usage"]["completion_tokens"] == generated
    assert len(choice["logprobs"]["tokens"]) == generated
    assert engine.running == 0


async def test_a_stop_string_aborts_its_own_choice_alone(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    scripts = {0: ids("hello world the the"), 1: ids("the the the the")}
    engine.script = lambda submission, choice: scripts[choice]
    answer = await complete(client, stop="world", n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["hello ", "the the the the"]
    assert engine.submissions[0].aborted == {0}


async def test_stop_strings_are_not_looked_for_in_the_prompt_or_before_min_tokens(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = says("world world world")
    answer = await complete(client, prompt="hello world", echo=True, stop="world", min_tokens=6)
    assert answer["choices"][0]["text"] == "hello worldworld world "


async def test_min_tokens_holds_for_what_a_prefix_of_a_stop_was(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says("hello world")
    answer = await complete(client, stop="hello world", min_tokens=1)
    assert answer["choices"][0]["text"] == "hello world"


async def test_end_tokens_show_only_when_both_flags_ask(client: httpx.AsyncClient) -> None:
    async def text(**fields: Any) -> str:
        return str((await complete(client, **fields))["choices"][0]["text"])

    assert await text(skip_special_tokens=False) == "hello world"
    assert await text(include_stop_str_in_output=True) == "hello world"
    both = await text(skip_special_tokens=False, include_stop_str_in_output=True)
    assert both == "hello world<|endoftext|>"


async def test_stop_token_ids_end_the_text_before_them(client: httpx.AsyncClient) -> None:
    answer = await complete(client, stop_token_ids=ids(" world"))
    assert answer["choices"][0]["text"] == "hello"
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_a_continued_message(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "hello"}]
    await chat(client, messages=messages, continue_final_message=True)
    assert RAW.decode(engine.submissions[0].prompt).endswith("assistant\nhello")


@pytest.mark.parametrize(
    ("code", "status", "shown"),
    [
        (ErrorCode.QUEUE_FULL, 503, "queue_full"),
        (ErrorCode.ADAPTER_NOT_FOUND, 404, "model_not_found"),
        (ErrorCode.ADAPTER_UNAVAILABLE, 503, "adapter_unavailable"),
        (ErrorCode.ENGINE_DEAD, 503, "engine_dead"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "the"]])
async def test_what_the_engine_refuses_has_its_own_status(
    client: httpx.AsyncClient, engine: FakeEngine, code: ErrorCode, status: int, shown: str, stream: bool, prompt: Any
) -> None:
    engine.failure = EngineError(code, "the reason")
    told = await error(client, status, prompt=prompt, stream=stream)
    assert (told["code"], told["message"]) == (shown, "the reason")
    assert engine.running == 0


async def test_requests_that_are_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await error(client, 404, model="llama:none"))["code"] == "model_not_found"
    assert (await error(client, 400, model=""))["param"] == "model"
    assert (await error(client, 400, prompt=""))["param"] == "prompt"
    assert (await error(client, 400, prompt=[512]))["param"] == "prompt"
    assert (await error(client, 400, prompt=["a"] * 1025, n=2))["param"] == "prompt"
    assert (await error(client, 400, max_tokens=256))["code"] == "context_length_exceeded"
    assert (await error(client, 400, "/v1/chat/completions", max_tokens=250))["code"] == "context_length_exceeded"
    assert (await error(client, 400, prompt="a" * 256))["code"] == "context_length_exceeded"
    assert (await error(client, 400, lora_path="sql"))["param"] == "lora_path"
    assert engine.submissions == []


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["llama", "llama:sql"]
    for model in listed["data"]:
        assert (await client.get(f"/v1/models/{model['id']}")).json() == model


@pytest.mark.parametrize("name", ["llama:sql%0A", "llama%0A", "llama:none", "LLAMA", "llama%20", "a%0Ab", "llama/", ""])
async def test_models_that_are_not_there(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/v1/models/{name}")).status_code == 404


async def test_timers_see_each_choice(client: httpx.AsyncClient, gateway: Gateway) -> None:
    await complete(client, n=2)
    assert isinstance(gateway.metrics, FakeMetrics)
    first, second = gateway.metrics.timers
    assert first.events == ["first", 1, 1, 1, ("stop", 1, 3)]
    assert second.events == ["first", 1, 1, 1, ("stop", 0, 3)]


async def test_a_begin_token_of_the_tokenizer(engine: FakeEngine, tmp_path: Path) -> None:
    gateway = make_gateway(engine, write_folder(tmp_path, byte_level(add_bos=True)))
    async with asgi_client(make_app(gateway)) as client:
        answer = await complete(client, prompt="hello", echo=True, logprobs=0, max_tokens=1)
    assert answer["choices"][0]["text"] == "hellohello"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["<|im_start|>", "hello", "hello"]
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 0, 5]
    assert engine.submissions[0].prompt[0] == 1


@pytest.mark.parametrize("interval", [1, 3])
async def test_streamed_text_equals_unstreamed_text(engine: FakeEngine, tmp_path: Path, interval: int) -> None:
    text = "hello world é 你 the end"
    engine.script = says(text)
    gateway = make_gateway(engine, write_folder(tmp_path), FakeSettings(stream_interval=interval))
    async with asgi_client(make_app(gateway)) as client:
        whole = await complete(client, stop=["the x", "d."], max_tokens=60)
        response = await client.post(
            "/v1/completions", json=COMPLETION | {"stream": True, "stop": ["the x", "d."], "max_tokens": 60}
        )
    chunks = parse_events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"] == text
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == 1
    assert not any("�" in chunk["choices"][0]["text"] for chunk in chunks)
    tokens = len(ids(text))
    assert len(chunks) <= tokens if interval == 1 else len(chunks) <= tokens // interval + 2


def parse_events(body: str) -> list[Any]:
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [httpx.Response(200, text=event).json() for event in events]


async def test_nothing_is_left_open(engine: FakeEngine, gateway: Gateway) -> None:
    """Whatever ends a call, the engine has no open request behind it."""
    engine.failure = EngineError(ErrorCode.INTERNAL, "x")
    async with asgi_client(make_app(gateway)) as client:
        for fields in ({}, {"prompt": ["a", "b", "c"]}, {"stream": True}, {"n": 3}):
            with contextlib.suppress(httpx.HTTPError):
                await client.post("/v1/completions", json=COMPLETION | fields)
    assert engine.running == 0

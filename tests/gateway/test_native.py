"""SGLang's /generate over the scripted engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.types import FinishReason, TokenLogprob
from gateway.choice import Piece
from tests.gateway.app_harness import App, make_app
from tests.gateway.fake_engine import FakeEngine, Script, fixed, model_info
from tests.gateway.harness import serve
from tests.gateway.tokenizer_files import byte_level

RAW = byte_level()


def ids(text: str) -> list[int]:
    tokens: list[int] = RAW.encode(text).ids
    return tokens


def says(text: str) -> Script:
    return fixed(*ids(text))


@pytest.fixture
def app(tmp_path: Path) -> App:
    return make_app(tmp_path, FakeEngine(adapters=["sql", "pirate"], script=says("hello world")))


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with app.client() as client:
        yield client


async def generate(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/generate", json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


async def test_a_text_gives_an_object(client: httpx.AsyncClient, app: App) -> None:
    answer = await generate(client, text="hello")
    meta = answer["meta_info"]
    assert answer["text"] == "hello world"
    assert answer["output_ids"] == [*ids("hello world"), 0]
    assert meta["finish_reason"] == {"type": "stop", "matched": 0}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (1, 3, 0)
    assert meta["id"]
    assert meta["e2e_latency"] >= 0
    params = app.engine.submissions[0].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (128, 1.0, 0, 1.0)


async def test_the_checkpoints_defaults_are_not_this_routes(tmp_path: Path) -> None:
    model = model_info(generation_defaults={"temperature": 0.2, "top_p": 0.9})
    app = make_app(tmp_path, FakeEngine(model, script=says("hello")))
    async with app.client() as client:
        await generate(client, text="hello")
    assert (app.engine.submissions[0].params.temperature, app.engine.submissions[0].params.top_p) == (1.0, 1.0)


async def test_a_list_gives_a_list_each_with_its_own_adapter(client: httpx.AsyncClient, app: App) -> None:
    answers = await generate(
        client,
        text=["hello", "the world", "hello hello"],
        lora_path=["sql", None, "llama:pirate"],
        sampling_params={"max_new_tokens": 1, "temperature": 0},
    )
    assert [answer["text"] for answer in answers] == ["hello"] * 3
    assert [answer["meta_info"]["finish_reason"] for answer in answers] == [{"type": "length", "length": 1}] * 3
    assert "index" not in answers[0]
    adapters = app.engine.adapters
    wanted = [adapters["sql"].adapter_id, None, adapters["pirate"].adapter_id]
    assert [submission.adapter_id for submission in app.engine.submissions] == wanted
    assert (await generate(client, text=["hello"]))[0]["text"] == "hello world"


async def test_one_adapter_serves_a_whole_list(client: httpx.AsyncClient, app: App) -> None:
    await generate(client, text=["hello", "world"], lora_path="sql")
    assert {submission.adapter_id for submission in app.engine.submissions} == {app.engine.adapters["sql"].adapter_id}


async def test_token_ids_are_taken_as_they_stand(client: httpx.AsyncClient, app: App) -> None:
    assert (await generate(client, input_ids=[5, 6]))["text"] == "hello world"
    assert isinstance(await generate(client, input_ids=[[5, 6], [7]]), list)
    assert [submission.prompt for submission in app.engine.submissions] == [[5, 6], [5, 6], [7]]


async def test_every_sampling_parameter_reaches_the_engine(client: httpx.AsyncClient, app: App) -> None:
    sampling = {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.8, "top_k": 7, "min_p": 0.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"3": 1.5},
        "stop_token_ids": [4], "ignore_eos": True, "sampling_seed": 11,
    }  # fmt: skip
    await generate(client, text="hello", sampling_params=sampling, extra_key="s")
    submission = app.engine.submissions[0]
    params = submission.params
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_p) == (9, 2, 0.5, 0.8)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (7, 0.1, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.1, 0.2, {3: 1.5})
    assert (params.stop_token_ids, params.ignore_eos, params.seed, submission.salt) == ((4,), True, 11, "s")


async def test_values_that_change_nothing_are_taken(client: httpx.AsyncClient, app: App) -> None:
    sampling = {"top_k": -1, "spaces_between_special_tokens": True, "json_schema": None, "max_new_tokens": None, "n": 1}
    answer = await generate(
        client, text="hello", input_ids=None, lora_path=None, stream=False, return_logprob=False, image_data=None,
        priority=4, rid="mine", sampling_params=sampling,
    )  # fmt: skip
    assert answer["meta_info"]["id"] == "mine"
    assert app.engine.submissions[0].priority == 4
    assert (app.engine.submissions[0].params.top_k, app.engine.submissions[0].params.max_tokens) == (0, 128)


async def test_stop_strings_end_the_text(client: httpx.AsyncClient, app: App) -> None:
    answer = await generate(client, text="hello", sampling_params={"stop": ["wor"]})
    assert (answer["text"], answer["meta_info"]["finish_reason"]) == ("hello ", {"type": "stop", "matched": "wor"})
    kept = await generate(client, text="hello", sampling_params={"stop": "wor", "no_stop_trim": True})
    assert kept["text"] == "hello wor"


async def test_n_gives_a_list_even_for_one_text(client: httpx.AsyncClient) -> None:
    answers = await generate(client, text="hello", rid="r", sampling_params={"n": 2})
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1"]


async def test_logprobs_of_output_and_prompt(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"text": "hello world", "return_logprob": True, "sampling_params": {"max_new_tokens": 1}}
    meta = (await generate(client, **body))["meta_info"]
    hello, world = ids("hello world")
    assert meta["output_token_logprobs"] == [[-0.25, hello, None]]
    assert meta["input_token_logprobs"] == []
    assert "output_top_logprobs" not in meta
    more = body | {"logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = (await generate(client, **more))["meta_info"]
    assert meta["input_token_logprobs"] == [[None, hello, "hello"], [-0.25, world, " world"]]
    assert meta["input_top_logprobs"][0] is None
    assert [entry[1] for entry in meta["output_top_logprobs"][0]] == [hello, hello + 1]
    siblings = await generate(client, **more | {"sampling_params": {"max_new_tokens": 1, "n": 2}})
    assert siblings[0]["meta_info"]["input_token_logprobs"] == siblings[1]["meta_info"]["input_token_logprobs"]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"text": []}, "text"),
    ({"text": ""}, "text"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [1, [2]]}, "input_ids"),
    ({"input_ids": [512]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids[0]"),
    ({"text": ["a", "b"], "lora_path": ["sql"]}, "lora_path"),
    ({"text": "a", "lora_path": ["sql"]}, "lora_path"),
    ({"text": "a", "lora_path": "nope"}, "lora_path"),
    ({"text": "a", "lora_path": "SQL"}, "lora_path"),
    ({"text": "a", "lora_path": ""}, "lora_path"),
    ({"text": "a", "lora_path": "llama"}, "lora_path"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
    ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
    ({"text": "a", "model": "llama"}, "model"),
    ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"temperature": True}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"text": "a", "sampling_params": {"regex": "a*"}}, "regex"),
    ({"text": "a", "sampling_params": {"min_new_tokens": 200}}, "sampling_params.min_new_tokens"),
    ({"text": "a", "sampling_params": {"stop_token_ids": [999]}}, "sampling_params.stop_token_ids"),
    ({"text": "a", "sampling_params": {"logit_bias": {"x": 1}}}, "logit_bias"),
    ({"text": "a", "image_data": "x"}, "image_data"),
    ({"text": "a", "top_logprobs_num": 3}, "return_logprob"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": 5}, "logprob_start_len"),
]


@pytest.mark.parametrize(("body", "param"), REFUSALS)
async def test_refusals_name_the_field(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    error = await refused(client, **body)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


async def test_beyond_the_context_both_figures_are_told(client: httpx.AsyncClient) -> None:
    error = await refused(client, text="hello", sampling_params={"max_new_tokens": 256})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "sampling_params.max_new_tokens")
    assert "256 tokens" in error["message"]
    assert "257" in error["message"]


async def events(response: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


async def test_each_event_of_a_stream_holds_the_whole_text_so_far(app: App) -> None:
    async with serve(app.asgi) as address, httpx.AsyncClient(base_url=address) as client:
        body = {"text": "hello", "stream": True, "return_logprob": True}
        async with client.stream("POST", "/generate", json=body) as response:
            told = await events(response)
        assert [event["text"] for event in told] == ["hello", "hello world", "hello world"]
        assert [event["meta_info"]["completion_tokens"] for event in told] == [1, 2, 3]
        assert [len(event["meta_info"]["output_token_logprobs"]) for event in told] == [1, 2, 3]
        assert told[0]["meta_info"]["finish_reason"] is None
        assert told[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 0}
        assert "index" not in told[0]
        async with client.stream("POST", "/generate", json={"text": ["hello", "a"], "stream": True}) as response:
            several = await events(response)
        assert {event["index"] for event in several} == {0, 1}


async def test_what_came_together_is_one_event_a_choice(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tells of all so far: those in between would be built for nobody."""

    async def backlog(*_: object) -> AsyncIterator[list[Piece]]:
        entry = TokenLogprob(5, -1.0, 1, [(5, -1.0), (6, -2.0)])
        parts = [Piece(i % 2, [text], [5], [0], [entry]) for i, text in enumerate("abcd")]
        yield [*parts, Piece(0, finish=FinishReason.LENGTH), Piece(1, finish=FinishReason.LENGTH)]

    monkeypatch.setattr("gateway.native.run", backlog)
    async with serve(app.asgi) as address, httpx.AsyncClient(base_url=address) as client:
        body = {"text": ["a", "b"], "stream": True, "return_logprob": True, "top_logprobs_num": 2}
        async with client.stream("POST", "/generate", json=body) as response:
            told = await events(response)
    assert [(event["index"], event["text"]) for event in told] == [(0, "ac"), (1, "bd")]
    for event in told:
        assert event["meta_info"]["output_token_logprobs"] == [[-1.0, 5, None]] * 2
        assert event["meta_info"]["output_top_logprobs"] == [[[-1.0, 5, None], [-2.0, 6, None]]] * 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_ends_its_work(app: App, stream: bool) -> None:
    app.engine.hold()
    async with serve(app.asgi) as address:
        async with httpx.AsyncClient(base_url=address) as client:
            body = {"text": ["hello", "world"], "stream": stream}
            task = asyncio.create_task(client.post("/generate", json=body))
            await app.engine.until(lambda: app.engine.running == 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await app.engine.until(lambda: app.engine.running == 0)
        assert all(submission.aborted == {0} for submission in app.engine.submissions)

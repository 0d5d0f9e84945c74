"""GET /v1/lora_adapters of a real server: an adapter's way from its load over its first request to its unload."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from engine.models.dims import LORA_MODULES
from tests.e2e.conftest import Files
from tests.e2e.server import generate, load, unload

QUESTION = "List 3 countries and their capitals."


async def cards(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/v1/lora_adapters")
    assert response.status_code == 200
    return {card["name"]: card for card in response.json()["data"]}


async def until_running(client: httpx.AsyncClient, name: str, count: int) -> Any:
    """The adapter's card as soon as so many sequences of it run."""
    async with asyncio.timeout(10):
        while (card := (await cards(client))[name])["requests_running"] != count:  # noqa: ASYNC110 - told by polls alone
            await asyncio.sleep(0.01)
    return card


@pytest.fixture
async def guest(client: httpx.AsyncClient, files: Files) -> Any:
    """Another adapter beside the three, gone again when the test is over."""
    await load(client, "guest", files.rank64)
    yield "guest"
    if "guest" in await cards(client):
        await unload(client, "guest")


async def test_an_adapter_is_followed_from_load_to_unload(client: httpx.AsyncClient, guest: str) -> None:
    loaded = (await cards(client))[guest]
    assert (loaded["state"], loaded["tier"], loaded["rank"], loaded["pinned"]) == ("host", "host", 64, False)
    assert (loaded["id"], loaded["modules"], loaded["last_used"]) == ("llama:guest", list(LORA_MODULES), None)
    assert loaded["bytes"] > 0
    assert abs(loaded["created"] - time.time()) < 60

    await generate(client, QUESTION, guest, tokens=5)
    used = (await cards(client))[guest]
    assert (used["state"], used["tier"], used["requests_total"]) == ("resident", "arena", 1)
    assert (used["requests_running"], used["requests_waiting"], used["generated_tokens"]) == (0, 0, 5)
    assert used["prompt_tokens"] > 0
    assert used["last_used"] >= loaded["created"] - 1

    assert (await client.post("/pin_lora_adapter", json={"lora_name": guest})).status_code == 200
    assert (await cards(client))[guest]["pinned"] is True
    await unload(client, guest)
    assert set(await cards(client)) == {"lora0", "lora1", "lora2"}


async def test_requests_in_flight_are_counted(client: httpx.AsyncClient, guest: str) -> None:
    body = {"model": guest, "prompt": QUESTION, "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 3}
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        await anext(stream.aiter_bytes())
        assert (await until_running(client, guest, 3))["requests_waiting"] == 0
    await until_running(client, guest, 0)  # the client went


async def test_no_folder_of_the_server_is_told(client: httpx.AsyncClient, files: Files) -> None:
    text = (await client.get("/v1/lora_adapters")).text
    assert '"lora0"' in text
    for folder in (files.model, files.rank4, files.model.parent):
        assert str(folder) not in text

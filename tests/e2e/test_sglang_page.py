"""SGLang's page on LoRA serving, step by step: its flags, requests and checks, with adapters of rank 4, 64 and 256."""

import json
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import client_of, figures, generate, load, serving, unload, until

QUESTION = "List 3 countries and their capitals."
BOTH = [QUESTION, QUESTION]
TOKENS = 32


async def test_one_adapter(files: Files, tmp_path: Path) -> None:
    flags = ("--enable-lora", "--lora-paths", f"lora0={files.rank64}", "--max-loras-per-batch", "1")
    with serving(tmp_path / "log", *files.flags, *flags, "--log-level", "warning") as server:
        async with client_of(server) as client:
            with_adapter, base = await generate(client, BOTH, ["lora0", None], TOKENS)
            assert with_adapter != base
            assert base == await generate(client, QUESTION, None, TOKENS)
            assert with_adapter == await generate(client, QUESTION, "lora0", TOKENS)
            await nothing_can_be_pinned(client, files.rank4)


async def nothing_can_be_pinned(client: httpx.AsyncClient, source: Path) -> None:
    """With one slot: neither by a load nor afterwards; an unpinned load is fine."""
    body = {"lora_name": "pinned", "lora_path": str(source), "pinned": True}
    refused = await client.post("/load_lora_adapter", json=body)
    assert refused.status_code == 400
    assert "pin" in refused.json()["error_message"]
    assert list(refused.json()["loaded_adapters"]) == ["lora0"]
    assert (await client.post("/pin_lora_adapter", json={"lora_name": "lora0"})).status_code == 400
    assert list(await load(client, "lora1", source)) == ["lora0", "lora1"]
    await generate(client, BOTH, ["lora0", "lora1"], TOKENS)  # with one slot, one after the other


async def test_two_adapters(files: Files, tmp_path: Path) -> None:
    paths = (f"lora0={files.rank64}", f"lora1={files.rank4}")
    flags = ("--enable-lora", "--lora-paths", *paths, "--max-loras-per-batch", "2")
    with serving(tmp_path / "log", *files.flags, *flags, "--log-level", "warning") as server:
        async with client_of(server) as client:
            texts = await generate(client, [*BOTH, QUESTION], ["lora0", "lora1", None], TOKENS)
            assert len(set(texts)) == 3
            await they_share_their_steps(client, texts)
            alone = [await generate(client, QUESTION, name, TOKENS) for name in ("lora0", "lora1", None)]
            assert texts == alone


async def they_share_their_steps(client: httpx.AsyncClient, texts: list[str]) -> None:
    """Once both adapters are in the arena: inputs of one call decode together, all but the first few tokens."""
    enough = (await figures(client))("mixed_adapter_steps_total") + TOKENS - 4
    assert await generate(client, [*BOTH, QUESTION], ["lora0", "lora1", None], TOKENS) == texts
    await until(client, lambda told: told("mixed_adapter_steps_total") >= enough, 10)


async def test_loading_while_it_runs(files: Files, tmp_path: Path) -> None:
    flags = ("--enable-lora", "--cuda-graph-max-bs", "2", "--max-loras-per-batch", "2", "--max-lora-rank", "256")
    with serving(tmp_path / "log", *files.flags, *flags, "--lora-target-modules", "all") as server:
        async with client_of(server) as client:
            assert await load(client, "lora0", files.rank4) == {"lora0": str(files.rank4)}
            assert list(await load(client, "lora1", files.rank64)) == ["lora0", "lora1"]
            first = await generate(client, BOTH, ["lora0", "lora1"], TOKENS)
            assert len(set(first)) == 2

            assert list(await unload(client, "lora0")) == ["lora1"]
            await unknown_until_loaded_again(client)
            assert (await load(client, "lora0", files.rank256))["lora0"] == str(files.rank256)
            second = await generate(client, BOTH, ["lora0", "lora1"], TOKENS)
            assert second[0] not in first
            assert second[1] == first[1]
            assert await same_over_the_openai_api(client, "llama:lora0") == second[0]


async def unknown_until_loaded_again(client: httpx.AsyncClient) -> None:
    gone = await client.post("/generate", json={"text": QUESTION, "lora_path": "lora0"})
    assert gone.status_code == 400
    assert "lora0" in gone.json()["error"]["message"]
    chat = {"model": "llama:lora0", "messages": [{"role": "user", "content": QUESTION}]}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 404
    again = await client.post("/unload_lora_adapter", json={"lora_name": "lora0"})
    assert again.status_code == 404
    assert again.json()["success"] is False


async def same_over_the_openai_api(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "prompt": QUESTION, "max_tokens": TOKENS, "temperature": 0}
    text: str = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    return text


async def test_pinning(files: Files, tmp_path: Path) -> None:
    lora0 = json.dumps({"lora_name": "lora0", "lora_path": str(files.rank4), "pinned": True})
    lora1 = json.dumps({"lora_name": "lora1", "lora_path": str(files.rank64)})
    flags = ("--enable-lora", "--max-loras-per-batch", "3", "--max-lora-rank", "256", "--lora-target-modules", "all")
    paths = ("--lora-paths", lora0, lora1, f"lora2={files.rank256}")
    names = ["lora0", "lora1", "lora2"]
    with serving(tmp_path / "log", *files.flags, *flags, *paths) as server:
        async with client_of(server) as client:
            before = await generate(client, [QUESTION] * 3, names, TOKENS)
            assert len(set(before)) == 3
            await unload(client, "lora1")
            assert sorted(await load(client, "lora1", files.rank64, pinned=True)) == names
            assert await generate(client, [QUESTION] * 3, names, TOKENS) == before
            told = await figures(client)
            assert told("slots_pinned") == 2
            assert told("adapter_loaded", base="llama", adapter="lora1", tier="arena", pinned="true") == 1
            await a_third_pin_is_refused(client)
            assert await generate(client, [QUESTION] * 3, names, TOKENS) == before


async def a_third_pin_is_refused(client: httpx.AsyncClient) -> None:
    refused = await client.post("/pin_lora_adapter", json={"lora_name": "lora2"})
    assert refused.status_code == 400
    assert "pin" in refused.json()["error_message"]
    assert refused.json()["error"]["message"] == refused.json()["error_message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_have_sglangs_shape(client: httpx.AsyncClient, stream: bool) -> None:
    """On the shared server: an object for a string, a list for a list; streams hold the whole text so far."""
    sampling = {"max_new_tokens": 5, "temperature": 0}
    body = {"text": QUESTION, "lora_path": "lora0", "sampling_params": sampling}
    whole = (await client.post("/generate", json=body)).json()
    assert whole["meta_info"]["completion_tokens"] == len(whole["output_ids"]) == 5
    assert whole["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    if not stream:
        listed = (await client.post("/generate", json=body | {"text": [QUESTION]})).json()
        assert [one["text"] for one in listed] == [whole["text"]]
        return
    async with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    texts = [json.loads(event)["text"] for event in events]
    assert texts[-1] == whole["text"]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))

"""Where adapters come from, on real servers: uploads, a folder of adapters, and a state that outlives the server."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import Server, client_of, generate, load, names_of, refusal, serving, unload
from tests.support.adapters import write_adapter

UPLOAD = "/v1/lora_adapters"
ALL = ("--max-lora-rank", "256", "--lora-target-modules", "all")


async def upload(client: httpx.AsyncClient, name: str, folder: Path, **fields: str) -> httpx.Response:
    files = {file: (folder / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors")}
    return await client.post(UPLOAD, data={"lora_name": name} | fields, files=files)


async def models(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """What /v1/models tells, but for the times of the loads."""
    data: list[dict[str, Any]] = (await client.get("/v1/models")).json()["data"]
    return [{key: value for key, value in card.items() if key != "created"} for card in data]


async def cards(client: httpx.AsyncClient) -> dict[str, Any]:
    return {card["name"]: card for card in (await client.get(UPLOAD)).json()["data"]}


async def test_an_upload_outlives_its_server_and_a_folders_adapter_comes_again(files: Files, tmp_path: Path) -> None:
    """The short form of what follows."""
    spool, folder = tmp_path / "spool", tmp_path / "adapters"
    write_adapter(folder / "lying", files.model, rank=8, seed=1)
    state = ("--lora-state", tmp_path / "state.json", "--lora-spool-dir", spool)
    flags = (*files.flags, *state, "--lora-dir", folder)
    with serving(tmp_path / "first", *flags, "--lora-preload", "lying") as server:
        async with client_of(server) as client:
            assert (await cards(client))["lying"]["tier"] == "host"
            sent = await upload(client, "sent", files.rank64, pinned="true")
            assert sent.json()["loaded_adapters"]["sent"] == "(uploaded)"
            before = [await generate(client, "hello", name) for name in ("sent", "lying")]
        assert server.stop() == 0
    with serving(tmp_path / "second", *flags) as server:
        async with client_of(server) as client:
            assert names_of(await models(client)) == ["llama", "llama:sent"]
            assert [await generate(client, "hello", name) for name in ("sent", "lying")] == before
            await unload(client, "sent")
            assert list(spool.glob("*/*/adapter_model.safetensors")) == []


@pytest.mark.slow
async def test_a_restart_serves_what_was_served(files: Files, tmp_path: Path) -> None:
    spool, state = tmp_path / "spool", tmp_path / "state.json"
    copy = write_adapter(tmp_path / "copy", files.model, rank=8, seed=9)
    paths = ("--lora-paths", f"lora0={files.rank4}", f"gone={files.rank64}", f"held={files.rank64}")
    flags = (*files.flags, *ALL, *paths, "--lora-state", state, "--lora-spool-dir", spool)
    names = (None, "lora0", "held", "folder", "sent", "doomed")
    with serving(tmp_path / "first", *flags) as server:
        async with client_of(server) as client:
            await load(client, "folder", files.rank256)
            assert (await upload(client, "sent", files.rank4, pinned="true", weight="2")).status_code == 200
            sent_again = await upload(client, "sent", files.rank64, load_inplace="true")
            assert sent_again.status_code == 200, sent_again.text
            await load(client, "doomed", copy)
            await unload(client, "gone")
            assert (await client.post("/pin_lora_adapter", json={"lora_name": "held"})).status_code == 200
            before, listed = [await generate(client, "hello", name) for name in names], await models(client)
            assert before[4] == before[2], "the second upload holds the same as 'held'"
        assert refusal(tmp_path / "second", *flags).endswith("another server that runs has this file")
        assert server.stop() == 0
    assert len(list(spool.glob("*/*/adapter_model.safetensors"))) == 1, "of the first upload nothing is left"
    with serving(tmp_path / "third", *flags) as server:
        async with client_of(server) as client:
            assert await models(client) == listed
            assert [await generate(client, "hello", name) for name in names] == before
            told = await cards(client)
            assert {name for name, card in told.items() if card["pinned"]} == {"sent", "held"}
            server.engine.kill()
            await healthy_again(client)
            assert await models(client) == listed
            assert [await generate(client, "hello", name) for name in names] == before
        server.stop()
    copy.rename(tmp_path / "moved")
    with serving(tmp_path / "fourth", *flags) as server:
        async with client_of(server) as client:
            assert names_of(await models(client)) == names_of(listed)
            card = (await cards(client))["doomed"]
            assert card["state"] == "failed"
            assert card["error"]
            assert str(tmp_path) not in json.dumps(card)
            assert [await generate(client, "hello", name) for name in names[:-1]] == before[:-1]
            await unload(client, "sent")
            assert list(spool.glob("*/*/adapter_model.safetensors")) == []


async def healthy_again(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while (await client.get("/health")).status_code == 200:  # noqa: ASYNC110 - another process tells by it alone
            await asyncio.sleep(0.02)
        while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_a_corrupt_state_is_a_clear_error(files: Files, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text('{"version": 1, "adapters": [')
    told = refusal(tmp_path / "log", *files.flags, "--lora-state", state)
    assert "--lora-state" in told
    assert "no state that loramux wrote" in told


@pytest.mark.slow
async def test_uploads_are_served_and_bad_ones_leave_nothing(files: Files, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with serving(tmp_path / "log", *files.flags, "--enable-lora", "--lora-spool-dir", spool) as server:
        async with client_of(server) as client:
            await load(client, "folder", files.rank64)
            response = await upload(client, "sent", files.rank64)
            assert response.status_code == 200, response.text
            assert response.json()["loaded_adapters"]["sent"] == "(uploaded)"
            assert await generate(client, "hello", "sent") == await generate(client, "hello", "folder")
            bad = await client.post(
                UPLOAD,
                data={"lora_name": "bad"},
                files={"adapter_config.json": b"{}", "adapter_model.safetensors": b"nothing"},
            )
            assert bad.status_code == 400
            assert str(tmp_path) not in bad.json()["error_message"]
            assert len(list(spool.glob("run-*/*/adapter_config.json"))) == 1
        server.stop()
        assert list(spool.glob("run-*")) == [], "without --lora-state uploads go with their server"


@pytest.mark.slow
async def test_adapters_of_a_folder_are_served_on_first_use(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        write_adapter(folder / name, files.model, rank=8, seed=seed)
    (folder / "escape").symlink_to(files.rank4)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    flags = (*files.flags, "--lora-dir", folder, "--max-loaded-loras", "2", "--max-loras-per-batch", "2")
    with serving(tmp_path / "log", *flags, "--lora-preload", "one", "--lora-warm", "two") as server:
        async with client_of(server) as client:
            told = await cards(client)
            assert (told["one"]["tier"], told["two"]["tier"], told["two"]["pinned"]) == ("host", "arena", False)
            texts = {name: await generate(client, "hello", name) for name in ("one", "two", "three")}
            assert len(set(texts.values())) == 3
            await refuses(client, server, folder)
            (folder / "two").rename(tmp_path / "away")
            for name in ("one", "three"):
                assert await generate(client, "hello", name) == texts[name]
            assert (await complete(client, "llama:two")).status_code == 404
            assert "llama:two" not in names_of(await models(client))


async def refuses(client: httpx.AsyncClient, server: Server, folder: Path) -> None:
    for name in ("escape", "none", "ONE", "../adapters/one", ".", "one/"):
        response = await complete(client, f"llama:{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    broken = await complete(client, "llama:broken")
    assert (broken.status_code, broken.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert str(folder) not in broken.text


async def complete(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 2})

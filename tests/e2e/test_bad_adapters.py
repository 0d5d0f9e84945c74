"""Adapters that cannot be served: each gets a 400 with the reason, on every path, and the server goes on."""

import json
import os
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Files
from tests.e2e.server import generate, names_of
from tests.support.adapters import write_adapter
from tests.support.models import write_model

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PATHS = ("/load_lora_adapter", "/v1/load_lora_adapter")
Spoil = Callable[[Path], object]


def edit_config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return spoil


def replace(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def spoil_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def spoil_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


def rename_modules(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "query")] = tensors.pop(name)


def only_a_pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


BAD: dict[str, tuple[Spoil, str]] = {
    "a missing config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "missing tensors": (lambda folder: (folder / TENSORS).unlink(), "has no adapter_model.safetensors"),
    "a pickle": (only_a_pickle, "pickle"),
    "a config that is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "not valid JSON"),
    "a truncated file": (lambda folder: os.truncate(folder / TENSORS, 1000), "truncated"),
    "DoRA": (edit_config(use_dora=True), "DoRA is not supported"),
    "biases": (edit_config(bias="all"), "biases are not supported"),
    "whole modules": (edit_config(modules_to_save=["lm_head"]), "trained whole are not supported"),
    "another method": (edit_config(peft_type="IA3"), "peft_type"),
    "an unknown setting": (edit_config(use_magic=True), "use_magic"),
    "NaN": (edit_tensors(spoil_nan), "NaN or infinite"),
    "a wrong shape": (edit_tensors(spoil_shape), "has shape [4, 63], expected [4, 64]"),
    "a wrong rank": (edit_config(r=8), "gives it rank 8"),
    "unknown modules": (edit_tensors(rename_modules), "query"),
    "a directory for a file": (replace(TENSORS, Path.mkdir), "not a regular file"),
    "a FIFO": (replace(TENSORS, os.mkfifo), "not a regular file"),
    "a device": (replace(TENSORS, lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "a FIFO for the config": (replace(CONFIG, os.mkfifo), "not a regular file"),
    "a dangling link": (replace(TENSORS, lambda path: path.symlink_to(path.parent / "none")), "has no adapter_model"),
}
SOURCES = {
    "a parent folder": ("../rank4", "'..' is not allowed"),
    "a parent folder inside": ("/tmp/../etc", "'..' is not allowed"),
    "a NUL": ("/tmp/a\0b", "control characters"),
    "a URL": ("https://example.com/adapter", "URLs are not supported"),
    "a file URL": ("file:///etc", "URLs are not supported"),
    "a folder that is not there": ("/nowhere/at/all", "no such folder"),
    "a file": ("/etc/hostname", "not a folder"),
    "a device": ("/dev/zero", "not a folder"),
    "a hub id, offline": ("someone/some-adapter", "hub"),
}
NAMES = {
    "a leading slash": "/etc/passwd",
    "a parent folder": "a/../b",
    "a NUL": "a\0b",
    "a line break": "lora9\n",
    "a colon": "a:b",
    "a space": "a b",
    "the base's": "llama",
    "too long": "x" * 129,
}


@pytest.fixture(autouse=True)
async def goes_on(client: httpx.AsyncClient) -> AsyncIterator[None]:
    """After each refusal: the same adapters as before, and a good answer."""
    yield
    models = names_of((await client.get("/v1/models")).json()["data"])
    assert models == ["llama", "llama:lora0", "llama:lora1", "llama:lora2"]
    assert await generate(client, "hello", "lora0", 2) is not None
    assert (await client.get("/health")).status_code == 200


async def refusal(client: httpx.AsyncClient, path: str, name: str, source: str) -> str:
    """The reason of a 400 with SGLang's three fields and `error` beside them."""
    response = await client.post(path, json={"lora_name": name, "lora_path": source})
    assert response.status_code == 400, response.text
    answer = response.json()
    assert set(answer) == {"success", "error_message", "loaded_adapters", "error"}
    assert answer["success"] is False
    assert sorted(answer["loaded_adapters"]) == ["lora0", "lora1", "lora2"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["code"] == "adapter_invalid"
    assert answer["error"]["message"] == answer["error_message"]
    reason: str = answer["error_message"]
    return reason


@pytest.mark.parametrize("bad", BAD)
async def test_a_bad_adapter(client: httpx.AsyncClient, files: Files, tmp_path: Path, bad: str) -> None:
    spoil, reason = BAD[bad]
    folder = write_adapter(tmp_path / "bad", files.model, rank=4, modules=("q_proj", "v_proj"))
    spoil(folder)
    told = [await refusal(client, path, "bad", str(folder)) for path in PATHS]
    assert reason in told[0]
    assert told[0] == told[1]


async def test_one_for_another_base(client: httpx.AsyncClient, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", hidden=32, heads=2, kv_heads=1)
    folder = write_adapter(tmp_path / "bad", other, rank=4)
    assert "another shape" in await refusal(client, PATHS[0], "bad", str(folder))


async def test_one_with_more_layers(client: httpx.AsyncClient, tmp_path: Path) -> None:
    deeper = write_model(tmp_path / "deeper", layers=3)
    folder = write_adapter(tmp_path / "bad", deeper, rank=4)
    assert "layer" in await refusal(client, PATHS[0], "bad", str(folder))


async def test_a_rank_beyond_the_limit(client: httpx.AsyncClient, files: Files, tmp_path: Path) -> None:
    """The server's limit was inferred from its adapters, the largest of rank 256."""
    folder = write_adapter(tmp_path / "bad", files.model, rank=257, modules=("q_proj",))
    reason = await refusal(client, PATHS[0], "bad", str(folder))
    assert "rank 257" in reason
    assert "--max-lora-rank" in reason


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source", SOURCES)
async def test_a_source_that_is_refused(client: httpx.AsyncClient, source: str, path: str) -> None:
    given, reason = SOURCES[source]
    assert reason in await refusal(client, path, "bad", given)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
async def test_a_name_that_no_adapter_may_bear(client: httpx.AsyncClient, files: Files, name: str, path: str) -> None:
    reason = await refusal(client, path, NAMES[name], str(files.rank4))
    assert "name" in reason
    assert len(reason) < 500


@pytest.mark.parametrize("path", PATHS)
async def test_a_name_that_is_taken(client: httpx.AsyncClient, files: Files, path: str) -> None:
    response = await client.post(path, json={"lora_name": "lora0", "lora_path": str(files.rank64)})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "adapter_exists"
    assert "lora0" in response.json()["error_message"]


async def test_links_that_end_at_files_are_fine(client: httpx.AsyncClient, files: Files, tmp_path: Path) -> None:
    """As in a snapshot of the hub's cache."""
    for name in (CONFIG, TENSORS):
        (tmp_path / name).symlink_to(files.rank4 / name)
    loaded = await client.post(PATHS[1], json={"lora_name": "linked", "lora_path": str(tmp_path)})
    assert loaded.status_code == 200, loaded.text
    assert await generate(client, "hello", "linked") == await generate(client, "hello", "lora0")
    assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "linked"})).status_code == 200


async def test_streams_go_on_while_a_bad_adapter_is_refused(
    client: httpx.AsyncClient, files: Files, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "bad", files.model, rank=4)
    edit_tensors(spoil_nan)(folder)
    body = {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 64, "temperature": 0}}
    async with client.stream("POST", "/generate", json=body) as response:
        lines = response.aiter_lines()
        await anext(lines)
        await refusal(client, PATHS[0], "bad", str(folder))
        assert [line async for line in lines if line][-1] == "data: [DONE]"

"""Adapters that come in the request's body: over real sockets where the body's way matters."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from engine.types import AdapterInfo, EngineError, ErrorCode
from gateway.malformed import HttpProtocol
from gateway.multipart import FormReader
from gateway.routes import uploads
from gateway.spool import LOCK
from tests.gateway.app_harness import App, make_app
from tests.gateway.fake_engine import FakeEngine, model_info
from tests.gateway.harness import serve

PATH = "/v1/lora_adapters"
CONFIG = b'{"r": 8}'
REMOTE = ("192.0.2.7", 5000)


def app_with(tmp_path: Path, **settings: Any) -> App:
    return make_app(tmp_path, FakeEngine(adapters=["sql"]), **settings)


@pytest.fixture
def app(tmp_path: Path) -> App:
    return app_with(tmp_path)


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    """Over a real socket."""
    async with serve(app.asgi) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        yield client


def files(weights: bytes = b"weights") -> dict[str, tuple[str, bytes]]:
    return {"adapter_config.json": ("/etc/passwd", CONFIG), "adapter_model.safetensors": ("../../x", weights)}


def spooled(tmp_path: Path) -> list[str]:
    """Everything in the spool, relative to its only server's folder."""
    root = tmp_path / "spool"
    found = [path.relative_to(root) for path in root.rglob("*") if path.name != LOCK]
    return sorted(str(Path(*path.parts[1:])) for path in found if len(path.parts) > 1)


def is_there(adapter: AdapterInfo) -> bool:
    return Path(adapter.source).exists()


async def upload(client: httpx.AsyncClient, name: str, weights: bytes = b"weights", **fields: str) -> httpx.Response:
    return await client.post(PATH, data={"lora_name": name} | fields, files=files(weights))


async def test_an_upload_is_written_and_loaded(client: httpx.AsyncClient, app: App, tmp_path: Path) -> None:
    weights = os.urandom(3 * uploads.WRITE_BYTES + 17)
    response = await upload(client, "team/new", weights, pinned="true", weight="2.5")
    assert response.status_code == 200, response.text
    loaded = {"sql": "/adapters/sql", "team/new": "(uploaded)"}
    assert response.json() == {"success": True, "error_message": None, "loaded_adapters": loaded}
    adapter = app.engine.adapters["team/new"]
    assert (adapter.pinned, adapter.weight) == (True, 2.5)
    folder = Path(adapter.source)
    assert folder.is_relative_to(tmp_path / "spool")
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    assert (folder / "adapter_config.json").read_bytes() == CONFIG
    assert [Path(name).name for name in spooled(tmp_path)[1:]] == list(files())
    assert str(tmp_path) not in (await client.get(PATH)).text
    assert (await client.get("/v1/models/llama:team/new")).status_code == 200


async def test_unload_removes_the_files(client: httpx.AsyncClient, tmp_path: Path) -> None:
    await upload(client, "new")
    assert (await client.post("/unload_lora_adapter", json={"lora_name": "new"})).status_code == 200
    assert spooled(tmp_path) == []


async def test_in_place_the_old_files_go_when_the_engine_has_left_them(
    client: httpx.AsyncClient, app: App, tmp_path: Path
) -> None:
    await upload(client, "new", b"first")
    first = app.engine.adapters["new"]
    assert (await upload(client, "new", b"refused")).json()["error"]["code"] == "adapter_exists"
    assert len(spooled(tmp_path)) == 3
    response = await upload(client, "new", b"second", load_inplace="1")
    assert response.status_code == 200, response.text
    second = app.engine.adapters["new"]
    assert (Path(second.source) / "adapter_model.safetensors").read_bytes() == b"second"
    assert (Path(first.source) / "adapter_model.safetensors").read_bytes() == b"first", "sequences may come back to it"
    keeper = app.asgi.state.gateway.keeper
    keeper.removed(first.adapter_id)
    async with asyncio.timeout(5):
        while is_there(first):  # noqa: ASYNC110 - a thread removes it
            await asyncio.sleep(0.01)
    keeper.removed(second.adapter_id)  # it was told before the load was answered
    await upload(client, "new", b"third", load_inplace="1")
    assert not is_there(second)
    assert len(spooled(tmp_path)) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_name": "../up"}, "lora_name"),
        ({"lora_name": "llama"}, "lora_name"),
        ({"lora_name": ""}, "lora_name"),
        ({"lora_name": "a\n"}, "lora_name"),
        ({"lora_name": "a", "pinned": "maybe"}, "pinned"),
        ({"lora_name": "a", "weight": "0"}, "weight"),
        ({"lora_name": "a", "weight": "nan"}, "weight"),
        ({"lora_name": "a", "load_inplace": "2"}, "load_inplace"),
        ({"lora_name": "a", "lora_path": "/etc"}, "lora_path"),
        ({"pinned": "true"}, "lora_name"),
    ],
)
async def test_bad_fields_are_named_and_leave_no_file(
    client: httpx.AsyncClient, app: App, tmp_path: Path, fields: dict[str, str], param: str
) -> None:
    response = await client.post(PATH, data=fields, files=files())
    body = response.json()
    assert (response.status_code, body["error"]["param"], body["success"]) == (400, param, False)
    assert spooled(tmp_path) == []
    assert list(app.engine.adapters) == ["sql"]


async def test_a_missing_file_is_named(client: httpx.AsyncClient, tmp_path: Path) -> None:
    response = await client.post(PATH, data={"lora_name": "a"}, files={"adapter_config.json": CONFIG})
    assert response.json()["error"]["param"] == "adapter_model.safetensors"
    assert spooled(tmp_path) == []


async def test_a_load_that_fails_leaves_no_file_and_tells_why(
    client: httpx.AsyncClient, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: Any, **kwargs: Any) -> AdapterInfo:
        assert len(spooled(tmp_path)) == 3
        raise EngineError(ErrorCode.ADAPTER_INVALID, "it holds NaN")

    monkeypatch.setattr(app.engine, "load_adapter", refuse)
    response = await upload(client, "new")
    assert (response.status_code, response.json()["error_message"]) == (400, "it holds NaN")
    assert spooled(tmp_path) == []


@pytest.mark.parametrize("announced", [True, False])
async def test_too_large_an_upload_is_a_413_and_leaves_no_file(tmp_path: Path, announced: bool) -> None:
    app = app_with(tmp_path, max_lora_upload_bytes=100_000)
    request = httpx.Request("POST", "http://x", data={"lora_name": "new"}, files=files(b"x" * 5 * 2**20))
    body = request.read()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    headers = {"content-type": request.headers["content-type"]}
    async with serve(app.asgi) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        response = await client.post(PATH, content=body if announced else pieces(), headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert spooled(tmp_path) == []
        assert (await upload(client, "small", b"x" * 90_000)).status_code == 200, "it still serves"


async def test_its_limit_is_its_own(tmp_path: Path) -> None:
    app = app_with(tmp_path, max_body_bytes=1000)
    async with app.client() as client:
        assert (await upload(client, "new", b"x" * 100_000)).status_code == 200
        assert (await client.post("/load_lora_adapter", json={"lora_name": "x" * 2000})).status_code == 413


async def test_an_upload_that_breaks_off_leaves_no_file(app: App, tmp_path: Path) -> None:
    request = httpx.Request("POST", "http://x", data={"lora_name": "new"}, files=files(b"x" * 4 * 2**20))
    body = request.read()
    async with serve(app.asgi) as url:
        host = urlsplit(url)
        _, writer = await asyncio.open_connection(host.hostname, host.port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: {request.headers['content-type']}\r\n\r\n".encode() + body[: 3 * 2**20])
        await writer.drain()
        async with asyncio.timeout(10):
            while not any(name.endswith("safetensors") for name in spooled(tmp_path)):  # noqa: ASYNC110 - threads write
                await asyncio.sleep(0.01)
        writer.close()
        async with asyncio.timeout(10):
            while spooled(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert list(app.engine.adapters) == ["sql"]


async def test_a_client_that_falls_silent_is_given_up(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SILENCE_SECONDS", 0.05)
    async with serve(app.asgi) as url:
        host = urlsplit(url)
        reader, writer = await asyncio.open_connection(host.hostname, host.port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
        writer.write(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408")
        writer.close()
    assert spooled(tmp_path) == []


async def test_the_server_answers_others_while_an_upload_is_written(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    feed = FormReader.feed

    def slow(reader: FormReader, data: bytes) -> None:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(30)
        feed(reader, data)

    monkeypatch.setattr(FormReader, "feed", slow)
    uploading = asyncio.create_task(upload(client, "new"))
    await started.wait()
    assert (await client.get("/v1/models")).status_code == 200
    go.set()
    assert (await uploading).status_code == 200


async def test_a_full_disk_is_told_and_leaves_no_file(
    client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(reader: FormReader, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FormReader, "feed", full)
    response = await upload(client, "new")
    assert (response.status_code, response.json()["error"]["code"]) == (507, "spool_full")
    assert spooled(tmp_path) == []


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"origin": "http://localhost:30000"}, "origin_refused"),
        ({"origin": "null"}, "origin_refused"),
        ({"sec-fetch-site": "cross-site"}, "origin_refused"),
        ({"sec-fetch-site": "same-site"}, "origin_refused"),
        ({"sec-fetch-site": "same-origin"}, "origin_refused"),
    ],
)
async def test_no_web_page_can_post_a_form_here(
    client: httpx.AsyncClient, app: App, tmp_path: Path, headers: dict[str, str], code: str
) -> None:
    """Browsers post multipart forms anywhere without asking first."""
    response = await client.post(PATH, data={"lora_name": "new"}, files=files(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, code)
    assert not (tmp_path / "spool").exists()
    assert list(app.engine.adapters) == ["sql"]


async def test_other_content_types_are_refused(client: httpx.AsyncClient) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=b"):
        response = await client.post(PATH, content=b"--b--", headers={"content-type": kind})
        assert response.status_code == 415


async def test_who_may_upload(tmp_path: Path) -> None:
    app = app_with(tmp_path / "open")
    async with app.client(REMOTE) as client:
        assert (await upload(client, "new")).json()["error"]["code"] == "admin_key_required"
        assert (await client.get(PATH)).status_code == 200, "the list is open"
    keyed = app_with(tmp_path / "keyed", api_key="user", admin_api_key="boss")
    async with keyed.client(REMOTE) as client:
        for header in (httpx.Headers(), httpx.Headers({"authorization": "Bearer user"})):
            client.headers = header
            assert (await upload(client, "new")).status_code == 401
        client.headers = httpx.Headers({"authorization": "Bearer boss"})
        assert (await upload(client, "new")).status_code == 200
        refused = await client.post(PATH, data={"lora_name": "b"}, files=files(), headers={"origin": "http://evil"})
        assert refused.status_code == 403
        wrong = await client.post(PATH, json={"lora_name": "b"})
        assert wrong.status_code == 415


@pytest.mark.parametrize(("keys", "origin", "status"), [({"admin_api_key": "boss"}, None, 401), ({}, "http://x", 403)])
async def test_a_refusal_can_be_read_however_large_the_upload(
    tmp_path: Path, keys: dict[str, str], origin: str | None, status: int
) -> None:
    """With clients that send the whole body before they read, over the server's own protocol; then it still serves."""
    app = app_with(tmp_path, **keys)
    async with serve(app.asgi, HttpProtocol) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        headers = {} if origin is None else {"origin": origin}
        for _ in range(2):
            large = files(b"x" * 24 * 2**20)
            response = await client.post(PATH, data={"lora_name": "new"}, files=large, headers=headers)
            assert response.status_code == status
            assert response.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 200
    assert not (tmp_path / "spool").exists()


async def test_a_pinned_upload_that_does_not_reach_the_arena_keeps_its_files(
    client: httpx.AsyncClient, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = app.engine.load_adapter

    async def fail_late(*args: Any, **kwargs: Any) -> AdapterInfo:
        await load(*args, **kwargs | {"pinned": False})
        raise EngineError(ErrorCode.ADAPTER_UNAVAILABLE, "the copy failed")

    monkeypatch.setattr(app.engine, "load_adapter", fail_late)
    response = await upload(client, "new", pinned="true")
    assert (response.status_code, response.json()["error_message"]) == (503, "the copy failed")
    assert is_there(app.engine.adapters["new"]), "it is loaded, and comes back from there"
    assert (await client.post("/unload_lora_adapter", json={"lora_name": "new"})).status_code == 200
    assert spooled(tmp_path) == []


async def test_two_uploads_at_once_that_replace_one_leave_each_its_files_while_they_may_be_needed(
    client: httpx.AsyncClient, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await upload(client, "new", b"first")
    versions = [app.engine.adapters["new"]]
    turn, both = asyncio.Lock(), asyncio.Barrier(2)
    load = app.engine.load_adapter

    async def together(*args: Any, **kwargs: Any) -> AdapterInfo:
        await both.wait()
        async with turn:
            versions.append(await load(*args, **kwargs))
            return versions[-1]

    monkeypatch.setattr(app.engine, "load_adapter", together)
    await asyncio.gather(*(upload(client, "new", weights, load_inplace="1") for weights in (b"second", b"third")))
    assert [is_there(version) for version in versions] == [True, True, True]
    for version in versions[:2]:
        app.asgi.state.gateway.keeper.removed(version.adapter_id)
    async with asyncio.timeout(5):
        while any(map(is_there, versions[:2])):  # noqa: ASYNC110 - a thread removes them
            await asyncio.sleep(0.01)
    assert is_there(versions[2])
    assert len(spooled(tmp_path)) == 3


async def test_without_lora_nothing_is_written(tmp_path: Path) -> None:
    app = make_app(tmp_path, FakeEngine(model_info(enable_lora=False)))
    async with app.client() as client:
        response = await upload(client, "new")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "lora_disabled")
    assert not (tmp_path / "spool").exists()

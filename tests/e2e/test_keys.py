"""Who may call what over real sockets: API key, admin key, loopback, web pages; and no secret in any log."""

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import Server, client_of, load, serving, unload

API_KEY, ADMIN_KEY = "sk-api-0f5e7c", "sk-admin-91d2ab"
SAID = "what a user said"
ADMIN_ROUTES = ("load_lora_adapter", "unload_lora_adapter", "pin_lora_adapter", "unpin_lora_adapter")
CHANGES = [f"/{route}" for route in ADMIN_ROUTES] + [f"/v1/{route}" for route in ADMIN_ROUTES[:2]]
COMPLETION = {"model": "llama", "prompt": "hello", "max_tokens": 1}


@pytest.fixture(scope="module")
def keyed(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both keys from the environment, everything logged."""
    log = tmp_path_factory.mktemp("keyed") / "log"
    env = {"LORAMUX_API_KEY": API_KEY, "LORAMUX_ADMIN_API_KEY": ADMIN_KEY}
    flags = ("--lora-paths", f"lora0={files.rank4}", "--log-level", "debug")
    with serving(log, *files.flags, *flags, env=env) as server:
        yield server


@pytest.fixture
async def keyless(keyed: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(keyed) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_the_api_key_is_wanted_by_all_that_serves(keyless: httpx.AsyncClient) -> None:
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/llama"),
        ("GET", "/get_model_info"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/generate"),
    ):
        for headers in ({}, bearer("wrong"), {"authorization": API_KEY}, {"authorization": f"Basic {API_KEY}"}):
            response = await keyless.request(method, path, headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/metrics"):
        assert (await keyless.get(path)).status_code == 200
    for key in (API_KEY, ADMIN_KEY):
        assert (await keyless.post("/v1/completions", json=COMPLETION, headers=bearer(key))).status_code == 200


async def test_the_openai_client_sends_the_key(keyed: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key=API_KEY, max_retries=0) as sdk:
        assert [model.id async for model in sdk.models.list()] == ["llama", "llama:lora0"]
    async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key="wrong", max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError):
            await sdk.models.list()


@pytest.mark.parametrize("path", CHANGES)
async def test_the_admin_key_is_wanted_by_all_that_changes(keyless: httpx.AsyncClient, path: str) -> None:
    for headers in ({}, bearer(API_KEY), bearer("wrong"), bearer(ADMIN_KEY[:-1])):
        assert (await keyless.post(path, json={"lora_name": "lora0"}, headers=headers)).status_code == 401
    answered = await keyless.post(path, json={"lora_name": 5}, headers=bearer(ADMIN_KEY))
    assert answered.status_code == 400


async def test_with_the_admin_key_adapters_come_and_go(keyed: Server, files: Files) -> None:
    async with keyed.client(authorization=f"Bearer {ADMIN_KEY}") as client:
        assert list(await load(client, "lora1", files.rank4)) == ["lora0", "lora1"]
        assert list(await unload(client, "lora1")) == ["lora0"]


async def test_no_secret_reaches_a_log_or_another_process(keyed: Server, keyless: httpx.AsyncClient) -> None:
    """Runs last in this file: after good and bad keys, with everything logged."""
    for path in ("/v1/models?api_key=" + API_KEY, "/load_lora_adapter?key=" + ADMIN_KEY):
        await keyless.post(path, json={"api_key": API_KEY}, headers=bearer(ADMIN_KEY))
    told = COMPLETION | {"prompt": SAID, "echo": True}
    for stream in (False, True):
        answer = await keyless.post("/v1/completions", json=told | {"stream": stream}, headers=bearer(API_KEY))
        assert SAID in answer.text
    log = keyed.text()
    assert "POST" in log
    for secret in (API_KEY, ADMIN_KEY, ADMIN_KEY[:-1], SAID):
        assert secret not in log
        assert secret not in (await keyless.get("/metrics")).text
        assert not any(secret in value for value in keyed.engine.environ().values())
        assert not any(secret in word for word in keyed.engine.cmdline())


# Without keys: the shared server


@pytest.mark.parametrize("path", CHANGES)
async def test_no_web_page_can_change_the_server(client: httpx.AsyncClient, files: Files, path: str) -> None:
    body = {"lora_name": "new", "lora_path": str(files.rank4)}
    for origin in ("https://example.com", "http://127.0.0.1:30000", "null"):
        response = await client.post(path, json=body, headers={"origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_refused")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = await client.post(path, content=b"{}", headers={"content-type": kind} if kind else {})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "llama:new" not in (await client.get("/v1/models")).text


def own_address() -> str | None:
    """An address of this machine that is not the loopback's."""
    addresses = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    found = [entry.address for entry in addresses if entry.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)


async def test_only_the_loopback_may_change_without_an_admin_key(files: Files, tmp_path: Path) -> None:
    """Judged by the socket's peer: no proxy's header helps. An API key alone opens nothing to others."""
    if (address := own_address()) is None:
        pytest.skip("this machine has no address but the loopback's")
    with serving(tmp_path / "log", *files.flags, "--enable-lora", "--host", "0.0.0.0") as server:
        async with client_of(server) as local:
            assert list(await load(local, "lora0", files.rank4)) == ["lora0"]
        server.url = server.url.replace("127.0.0.1", address)
        async with client_of(server) as other:
            assert (await other.post("/v1/completions", json=COMPLETION)).status_code == 200
            body = {"lora_name": "lora1", "lora_path": str(files.rank4)}
            for headers in ({}, {"x-forwarded-for": "127.0.0.1", "x-real-ip": "::1", "forwarded": "for=127.0.0.1"}):
                response = await other.post("/load_lora_adapter", json=body, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_key_required")

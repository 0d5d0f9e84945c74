"""Requests that cannot be answered: broken JSON, wrong values in every field, sizes, routes, methods, names."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gateway.protocol.chat import ChatRequest
from gateway.protocol.completions import CompletionRequest
from gateway.protocol.native import GenerateRequest
from gateway.routes import admin
from tests.e2e.server import Server, generate
from tests.e2e.spoiled import wrong_bodies

CHAT = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
COMPLETION = {"model": "llama", "prompt": "hello", "max_tokens": 2}
LOAD = {"lora_name": "new", "lora_path": "/nowhere"}
UNLOAD = {"lora_name": "nobody"}
ROUTES: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, COMPLETION),
    "/v1/chat/completions": (ChatRequest, CHAT),
    "/generate": (GenerateRequest, {"text": "hello"}),
    "/load_lora_adapter": (admin.LoadAdapterRequest, LOAD),
    "/v1/load_lora_adapter": (admin.VllmLoadAdapterRequest, LOAD),
    "/unload_lora_adapter": (admin.AdapterRequest, UNLOAD),
    "/v1/unload_lora_adapter": (admin.VllmUnloadAdapterRequest, UNLOAD),
    "/pin_lora_adapter": (admin.AdapterRequest, UNLOAD),
    "/unpin_lora_adapter": (admin.AdapterRequest, UNLOAD),
}
LIMIT = 4 * 2**20
JSON = {"content-type": "application/json"}
BROKEN = {
    "empty": b"",
    "cut off": b'{"model": "llama"',
    "a list": b"[]",
    "null": b"null",
    "a string": b'"hello"',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "half a surrogate pair": b'{"model": "\\ud800"}',
    "two values": b"{} {}",
    "NaN": b'{"temperature": NaN}',
    "deep": b"[" * 200_000,
    "a deep field": b'{"metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "a huge number": b'{"temperature": 1e999}',
}


@pytest.fixture(autouse=True)
async def goes_on(client: httpx.AsyncClient) -> AsyncIterator[None]:
    yield
    assert await generate(client, "hello", "lora0", 2) is not None


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, which has OpenAI's four fields and a short message."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 600
    return error


@pytest.mark.parametrize("route", ROUTES)
async def test_a_wrong_value_in_any_field_is_a_400_that_names_it(client: httpx.AsyncClient, route: str) -> None:
    kind, good = ROUTES[route]
    count = 0
    for wrong in wrong_bodies(kind, good):
        response = await client.post(route, json=wrong.body)
        assert response.status_code == 400, f"{wrong.path}: {response.status_code} {response.text[:300]}"
        error = error_of(response, 400)
        assert error["type"] == "invalid_request_error", wrong.path
        assert wrong.field in f"{error['param']} {error['message']}", f"{wrong.path}: {error}"
        count += 1
    assert count >= 4 * len(msgspec.structs.fields(kind))


@pytest.mark.parametrize("route", ROUTES)
async def test_an_unknown_field_is_a_400_that_names_it(client: httpx.AsyncClient, route: str) -> None:
    error = error_of(await client.post(route, json=ROUTES[route][1] | {"lora": "lora0"}), 400)
    assert error["param"] == "lora"


@pytest.mark.parametrize("route", ROUTES)
async def test_broken_json_is_a_400(client: httpx.AsyncClient, route: str) -> None:
    for name, body in BROKEN.items():
        error = error_of(await client.post(route, content=body, headers=JSON), 400)
        assert error["type"] == "invalid_request_error", name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_a_413(client: httpx.AsyncClient, route: str, announced: bool) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(LIMIT // 65536):
            yield b" " * 65536
        yield b"{"

    content: Any = b" " * (LIMIT + 1) if announced else parts()
    error = error_of(await client.post(route, content=content, headers=JSON), 413)
    assert str(LIMIT) in error["message"]


async def test_a_body_at_the_limit_is_read(client: httpx.AsyncClient) -> None:
    body = json.dumps(COMPLETION).encode()
    response = await client.post("/v1/completions", content=body + b" " * (LIMIT - len(body)), headers=JSON)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "path", ["/page", "/v1", "/v1/", "/v2/models", "/v1/chat/completions/", "/generate%0A", "/v1/models/"]
)
async def test_an_unknown_route_is_a_404(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "POST"):
        response = await client.request(method, path)
        if path == "/v1/models/":  # a model without a name
            assert response.status_code in (400, 404, 405)
            continue
        assert error_of(response, 404)["code"] == "unknown_route"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *(("GET", route, "POST") for route in ROUTES),
        ("PUT", "/v1/completions", "POST"),
        ("DELETE", "/v1/models/llama", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("PATCH", "/get_model_info", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_a_405_that_says_which(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    response = await client.request(method, path)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    "model",
    [
        *("Llama", " llama", "llama ", "llama\n", "llama:", ":lora0", "llama:lora0:", "llama:lora0:lora1"),
        *("llama:LORA0", "llama:lora0\n", "llama:none", "none", "none:lora0", "llama:../lora0", "x" * 10_000),
    ],
)
async def test_a_wrong_model_is_a_404_and_never_the_base(client: httpx.AsyncClient, model: str) -> None:
    for route, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        error = error_of(await client.post(route, json=body | {"model": model}), 404)
        assert error["code"] == "model_not_found"
        assert error["type"] == "invalid_request_error"
        assert error["param"] == "model"
    response = await client.get(httpx.URL(str(client.base_url)).join("/v1/models/" + _escaped(model)))
    error_of(response, 404)


@pytest.mark.parametrize("model", [None, ""])
async def test_no_model_is_a_400(client: httpx.AsyncClient, model: str | None) -> None:
    assert error_of(await client.post("/v1/completions", json=COMPLETION | {"model": model}), 400)["param"] == "model"


async def test_what_exceeds_the_context_is_a_400_with_both_figures(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json=COMPLETION | {"max_tokens": 2048}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    assert "2053" in error["message"]  # five tokens of the prompt and those
    long = COMPLETION | {"prompt": "a" * 2048, "max_tokens": None}
    assert error_of(await client.post("/v1/completions", json=long), 400)["code"] == "context_length_exceeded"


async def test_unknown_adapters_and_lists_of_other_lengths_are_a_400(client: httpx.AsyncClient) -> None:
    for body in (
        {"text": ["a", "b"], "lora_path": ["lora0"]},
        {"text": "a", "lora_path": ["lora0"]},
        {"text": ["a", "b"], "lora_path": ["lora0", "nobody"]},
        {"text": "a", "lora_path": "nobody"},
        {"text": "a", "lora_path": "llama"},
        {"text": "a", "lora_path": ""},
        {"text": "a", "lora_path": "../lora0"},
    ):
        assert error_of(await client.post("/generate", json=body), 400)["param"] == "lora_path", body


async def test_token_ids_outside_the_vocabulary_are_a_400(client: httpx.AsyncClient) -> None:
    outside: list[dict[str, Any]] = [{"prompt": [5, 256]}, {"stop_token_ids": [256]}, {"logit_bias": {"256": 1}}]
    for changes in [*outside, {"prompt": [[]]}]:
        assert error_of(await client.post("/v1/completions", json=COMPLETION | changes), 400)["param"]


async def test_an_error_names_no_path_of_the_server(client: httpx.AsyncClient, server: Server, tmp_path: Path) -> None:
    cards = (await client.get("/v1/models")).text + (await client.get("/get_model_info")).text
    assert str(server.log.parent.parent) not in cards
    assert "/tmp" not in cards


def _escaped(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())

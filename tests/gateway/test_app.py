"""What surrounds every route: error shapes, request ids, limits, logs, health."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from engine.config import EngineConfig
from gateway.app import all_routes
from gateway.routes import health
from gateway.settings import Settings
from tests.gateway.app_harness import App, make_app
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.harness import serve

COMPLETION = {"model": "llama", "prompt": "hello", "max_tokens": 2}


@pytest.fixture
def app(tmp_path: Path) -> App:
    return make_app(tmp_path, FakeEngine(adapters=["sql"]), max_body_bytes=1000)


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with app.client() as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; checks its shape."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", ["/page", "/v1", "/v1/nothing", "/health/", "/health%0A", "/v1/models%0A"])
async def test_unknown_routes_are_404(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("GET", "/generate", "POST"),
        ("PUT", "/load_lora_adapter", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
    ],
)
async def test_wrong_methods_are_405_and_told_the_right_ones(
    client: httpx.AsyncClient, method: str, path: str, allow: str
) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    assert error_of(response)["code"] == "method_not_allowed"


async def test_a_long_path_is_not_repeated_whole(client: httpx.AsyncClient) -> None:
    assert len(error_of(await client.get("/" + "x" * 5000))["message"]) < 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/load_lora_adapter"])
async def test_broken_json_is_400_on_every_path(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, content=b"{'a': 1}", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "JSON" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/unload_lora_adapter", "/nothing"])
async def test_a_body_over_the_limit_is_413(client: httpx.AsyncClient, path: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:  # sent without a length
        for _ in range(11):
            yield b" " * 100

    json = {"content-type": "application/json"}
    for content in (b" " * 1001, chunks()):
        response = await client.post(path, content=content, headers=json)
        if path == "/nothing" and not isinstance(content, bytes):
            continue  # its body is never read
        assert response.status_code == 413, response.text
        assert response.json()["error"]["code"] == "body_too_large"
    assert (await client.post(path, content=b" " * 1000, headers=json)).status_code in (400, 404)


async def test_a_large_body_over_a_socket_gets_its_answer(app: App) -> None:
    async with serve(app.asgi) as address, httpx.AsyncClient(base_url=address) as client:
        for _ in range(2):  # the connection stays usable
            response = await client.post("/v1/completions", content=b" " * 5_000_000)
            assert response.status_code == 413
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_a_body_without_a_length_is_measured_over_a_socket_too(app: App) -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 1001

    async with serve(app.asgi) as address, httpx.AsyncClient(base_url=address, timeout=10) as client:
        for count in (1, 3):  # the chunk that is too much is the last one, or not
            assert (await client.post("/v1/completions", content=chunks(count))).status_code == 413


async def test_every_answer_has_a_request_id(client: httpx.AsyncClient) -> None:
    seen = set()
    for path in ("/health", "/nothing", "/v1/models", "/v1/completions", "/metrics"):
        seen.add((await client.get(path)).headers["x-request-id"])
    assert len(seen) == 5
    assert (await client.get("/health", headers={"x-request-id": "mine-1.2:3"})).headers["x-request-id"] == "mine-1.2:3"
    for odd in ("", "a b", "x" * 129, "a\tb", "é"):
        told = (await client.get("/health", headers={b"x-request-id": odd.encode()})).headers["x-request-id"]
        assert told.startswith("req-")


async def test_a_fault_of_ours_is_a_500_that_tells_nothing(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("inside /secret/path")

    monkeypatch.setattr(app.asgi.state.gateway.registry, "cards", fail)
    async with app.client() as client:
        response = await client.get("/v1/models")
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    assert "inside /secret/path" in caplog.text


async def test_access_lines_hold_no_secret_and_no_forged_line(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gateway.access")
    async with app.client() as client:
        await client.get("/v1/nothing%0Aforged?key=s3cret", headers={"authorization": "Bearer s3cret"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "gateway.access"]
    assert "s3cret" not in line
    assert "\n" not in line
    assert " 404 " in line


async def test_health_follows_the_engine(app: App, client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    app.engine.alive = False
    response = await client.get("/health")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert error_of(response)["code"] == "engine_dead"


async def test_model_info_tells_no_paths(client: httpx.AsyncClient) -> None:
    told = (await client.get("/get_model_info")).json()
    assert (told["model_path"], told["is_generation"], told["max_loras_per_batch"]) == ("llama", True, 4)
    assert "/models/" not in str(told)


async def test_http_requests_are_counted_by_template(app: App, client: httpx.AsyncClient) -> None:
    for path in ("/v1/models/llama", "/v1/models/llama:sql", "/v1/models/nope", "/a", "/b"):
        await client.get(path)
    await client.request("BREW", "/health")
    text = (await client.get("/metrics")).text
    assert 'loramux_http_requests_total{method="GET",route="/v1/models/{model}",status="200"} 2.0' in text
    assert 'loramux_http_requests_total{method="GET",route="/v1/models/{model}",status="404"} 1.0' in text
    assert 'loramux_http_requests_total{method="GET",route="unmatched",status="404"} 2.0' in text
    assert 'loramux_http_requests_total{method="other",route="/health",status="405"} 1.0' in text


async def test_a_scrape_waits_for_fresh_figures_but_not_long(
    app: App, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(health, "STATS_SECONDS", 0.01)
    monkeypatch.setattr(app.engine, "stats", never)
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_the_gateway_may_be_replaced_while_serving(app: App, client: httpx.AsyncClient, tmp_path: Path) -> None:
    other = make_app(tmp_path / "other", FakeEngine(adapters=["new"]))
    app.asgi.state.gateway = other.asgi.state.gateway
    assert (await client.get("/v1/models/llama:new")).status_code == 200
    assert (await client.get("/v1/models/llama:sql")).status_code == 404


def test_handlers_are_plain_functions_of_a_request() -> None:
    """What the templates' table of endpoints relies on: no two routes share a handler."""
    endpoints = [route.endpoint for route in all_routes(Settings(engine=EngineConfig()))]  # type: ignore[attr-defined]
    assert len(set(endpoints)) == len(endpoints)
    assert all(endpoint.__annotations__ == {"request": Request, "return": Response} for endpoint in endpoints)

"""Loading, unloading and pinning over the scripted engine, on SGLang's paths and on vLLM's."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.types import AdapterInfo, AdapterState, EngineError, ErrorCode
from tests.gateway.app_harness import App, make_app
from tests.gateway.fake_engine import FakeEngine

LOAD_PATHS = ("/load_lora_adapter", "/v1/load_lora_adapter")
UNLOAD_PATHS = ("/unload_lora_adapter", "/v1/unload_lora_adapter")


@pytest.fixture
def app(tmp_path: Path) -> App:
    return make_app(tmp_path, FakeEngine(adapters=["sql"]))


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with app.client() as client:
        yield client


async def failed(response: httpx.Response, status: int) -> Any:
    """The four fields of a failure; checks that they agree."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"success", "error_message", "loaded_adapters", "error"}
    assert body["success"] is False
    assert body["error_message"] == body["error"]["message"]
    return body


async def test_load_and_unload_answer_with_what_is_loaded(client: httpx.AsyncClient, app: App) -> None:
    response = await client.post(
        "/load_lora_adapter", json={"lora_name": "a/b", "lora_path": "org/repo", "pinned": True, "weight": 2.5}
    )
    wanted = {"sql": "/adapters/sql", "a/b": "org/repo"}
    assert (response.status_code, response.json()) == (
        200,
        {"success": True, "error_message": None, "loaded_adapters": wanted},
    )
    assert app.engine.adapters["a/b"].pinned
    assert app.engine.adapters["a/b"].weight == 2.5
    assert (await client.get("/v1/models/llama:a/b")).status_code == 200
    response = await client.post("/unload_lora_adapter", json={"lora_name": "a/b"})
    assert response.json()["loaded_adapters"] == {"sql": "/adapters/sql"}
    assert (await client.get("/v1/models/llama:a/b")).status_code == 404


async def test_vllms_paths_do_the_same(client: httpx.AsyncClient, app: App) -> None:
    response = await client.post(
        "/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/x", "load_inplace": False}
    )
    assert (response.status_code, response.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert "a" in app.engine.adapters
    response = await client.post("/v1/unload_lora_adapter", json={"lora_name": "a", "lora_int_id": 3})
    assert response.status_code == 200
    assert "a" not in app.engine.adapters


async def test_pins_are_set_and_taken_back(client: httpx.AsyncClient, app: App) -> None:
    assert (await client.post("/pin_lora_adapter", json={"lora_name": "sql"})).json()["success"]
    assert app.engine.adapters["sql"].pinned
    assert (await client.post("/unpin_lora_adapter", json={"lora_name": "sql"})).json()["success"]
    assert not app.engine.adapters["sql"].pinned
    await failed(await client.post("/pin_lora_adapter", json={"lora_name": "nope"}), 404)


@pytest.mark.parametrize("path", LOAD_PATHS)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "../up", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "/abs", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a\0", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a:b", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a\n", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x" * 129, "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "llama", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": 3, "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path"),
        ({"lora_name": "a", "lora_path": ["/x"]}, "lora_path"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a", "lora_path": "/x", "typo": 1}, "typo"),
    ],
)
async def test_bad_bodies_name_the_field(
    client: httpx.AsyncClient, app: App, path: str, body: dict[str, Any], param: str
) -> None:
    told = await failed(await client.post(path, json=body), 400)
    assert told["error"]["param"] == param
    assert len(told["error_message"]) < 400
    assert list(app.engine.adapters) == ["sql"]


async def test_fields_of_the_wrong_type_are_refused(client: httpx.AsyncClient, app: App) -> None:
    body = {"lora_name": "a", "lora_path": "/x"}
    told = await failed(await client.post("/load_lora_adapter", json=body | {"pinned": "yes"}), 400)
    assert told["error"]["param"] == "pinned"
    for weight in (0, -1, 1e9, "2"):
        told = await failed(await client.post("/load_lora_adapter", json=body | {"weight": weight}), 400)
        assert told["error"]["param"] == "weight"
    for field, value in (("timeout", 0), ("timeout", 3601), ("revision", ""), ("load_inplace", "yes")):
        for path in LOAD_PATHS:
            told = await failed(await client.post(path, json=body | {field: value}), 400)
            assert told["error"]["param"] == field
    for field, value in (("timeout", -1), ("timeout", 3601), ("force", "yes"), ("pinned", True)):
        for path in UNLOAD_PATHS:
            told = await failed(await client.post(path, json={"lora_name": "sql", field: value}), 400)
            assert told["error"]["param"] == field
    assert app.engine.calls == []


@pytest.mark.parametrize("path", LOAD_PATHS)
async def test_loads_in_place_reach_the_engine(client: httpx.AsyncClient, app: App, path: str) -> None:
    first = app.engine.adapters["sql"].adapter_id
    body = {"lora_name": "sql", "lora_path": "org/sql", "load_inplace": True, "revision": "v2", "timeout": 5}
    assert (await client.post(path, json=body)).status_code == 200
    assert app.engine.adapters["sql"].adapter_id != first
    asked = {"name": "sql", "revision": "v2", "inplace": True, "timeout": 5.0}
    assert app.engine.calls == [("load", asked)]
    models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert models == ["llama", "llama:sql"]


@pytest.mark.parametrize("path", UNLOAD_PATHS)
@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({}, {"timeout": 30.0, "force": False}),
        ({"timeout": None, "force": None}, {"timeout": 30.0, "force": False}),
        ({"timeout": 0}, {"timeout": 0.0, "force": False}),
        ({"force": True, "timeout": 3600}, {"timeout": 3600.0, "force": True}),
    ],
)
async def test_unloads_say_how_long_they_wait(
    client: httpx.AsyncClient, app: App, path: str, more: dict[str, Any], asked: dict[str, Any]
) -> None:
    assert (await client.post(path, json={"lora_name": "sql"} | more)).status_code == 200
    assert app.engine.calls == [("unload", {"name": "sql"} | asked)]


@pytest.mark.parametrize("path", [*LOAD_PATHS, *UNLOAD_PATHS])
async def test_broken_json_is_refused(client: httpx.AsyncClient, path: str) -> None:
    await failed(await client.post(path, content=b"{", headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("path", LOAD_PATHS)
async def test_the_engines_refusals_are_told_with_the_same_status_on_both_paths(
    client: httpx.AsyncClient, app: App, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"lora_name": "sql", "lora_path": "/x"}
    assert (await failed(await client.post(path, json=body), 400))["error"]["code"] == "adapter_exists"
    for code, status in (
        (ErrorCode.ADAPTER_INVALID, 400),
        (ErrorCode.LORA_DISABLED, 400),
        (ErrorCode.ADAPTER_UNAVAILABLE, 503),
        (ErrorCode.ENGINE_DEAD, 503),
    ):

        async def refuse(*args: Any, code: ErrorCode = code, **kwargs: Any) -> AdapterInfo:
            raise EngineError(code, "the reason")

        monkeypatch.setattr(app.engine, "load_adapter", refuse)
        told = await failed(await client.post(path, json=body), status)
        assert (told["error_message"], told["loaded_adapters"]) == ("the reason", {"sql": "/adapters/sql"})


@pytest.mark.parametrize("path", UNLOAD_PATHS)
async def test_an_unknown_adapter_cannot_be_unloaded(client: httpx.AsyncClient, path: str) -> None:
    told = await failed(await client.post(path, json={"lora_name": "nope"}), 404)
    assert (told["error"]["param"], told["error"]["code"]) == ("lora_name", "adapter_not_found")


async def test_only_adapters_that_can_be_named_are_listed(client: httpx.AsyncClient, app: App) -> None:
    for state in (AdapterState.DRAINING, AdapterState.FAILED, AdapterState.COLD):
        app.engine.adapters[state.value] = AdapterInfo(name=state.value, adapter_id=9, source="s", state=state)
    told = await failed(await client.post("/unload_lora_adapter", json={"lora_name": "nope"}), 404)
    assert told["loaded_adapters"] == {"sql": "/adapters/sql", "cold": "s"}

"""openapi.yaml is what the routes and types say, and real answers are what it says."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route

from engine.config import EngineConfig
from gateway.app import all_routes
from gateway.settings import Settings
from tests.gateway.app_harness import make_app
from tests.gateway.fake_engine import FakeEngine

FOLDER = Path(__file__).parents[2] / "openapi"


@pytest.fixture(scope="module")
def spec() -> Any:
    return yaml.safe_load((FOLDER / "openapi.yaml").read_text(encoding="utf-8"))


def test_the_file_is_fresh() -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_names_exactly_what_is_served(spec: Any) -> None:
    served = {
        (method, route.path_format)
        for route in all_routes(Settings(engine=EngineConfig()))
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods} == served


def test_every_reference_leads_somewhere(spec: Any) -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                _, components, kind, name = node["$ref"].split("/")
                assert name in spec[components][kind]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(spec)


def test_unknown_fields_are_forbidden_in_every_request(spec: Any) -> None:
    schemas = spec["components"]["schemas"]
    requests = [name for name in schemas if name.endswith("Request")]
    assert len(requests) == 8
    assert all(schemas[name]["additionalProperties"] is False for name in requests)


def test_streams_are_events_with_data(spec: Any) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
        content = spec["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
        assert set(content["text/event-stream"]["schema"]["properties"]) == {"data", "event"}


async def test_answers_have_the_fields_that_are_required(spec: Any, tmp_path: Path) -> None:
    schemas = spec["components"]["schemas"]

    def holds(value: Any, name: str) -> None:
        assert set(schemas[name]["required"]) <= set(value) <= set(schemas[name]["properties"]), name

    async with make_app(tmp_path, FakeEngine(adapters=["sql"])).client() as client:
        holds((await client.get("/v1/models/llama:sql")).json(), "ModelCard")
        holds((await client.get("/get_model_info")).json(), "ModelFacts")
        body: Any = {"model": "llama", "prompt": "hello", "max_tokens": 2}
        completion = (await client.post("/v1/completions", json=body)).json()
        holds(completion, "Completion")
        holds(completion["usage"], "Usage")
        generated = (await client.post("/generate", json={"text": "hello"})).json()
        holds(generated, "Generated")
        holds(generated["meta_info"], "MetaInfo")
        failed = (await client.post("/unload_lora_adapter", json={"lora_name": "nope"})).json()
        holds(failed, "AdapterResult")
        holds(failed["error"], "ErrorFields")
        holds((await client.get("/nope")).json()["error"], "ErrorFields")

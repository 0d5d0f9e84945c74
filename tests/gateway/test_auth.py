"""Keys, loopback peers, and what a web page could send."""

from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from engine.config import EngineConfig
from gateway.app import all_routes
from gateway.auth import is_loopback
from gateway.routes import admin
from gateway.settings import Settings
from tests.gateway.app_harness import LOCAL, App, make_app
from tests.gateway.fake_engine import FakeEngine

REMOTE = ("192.0.2.7", 5000)
LOAD = {"lora_name": "a", "lora_path": "/x"}
ADMIN_PATHS = [route.path for route in admin.routes() if isinstance(route, Route)]


def app_with(tmp_path: Path, **keys: str) -> App:
    return make_app(tmp_path, FakeEngine(adapters=["sql"]), **keys)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_without_keys_everyone_is_served_and_only_this_machine_may_change(tmp_path: Path) -> None:
    app = app_with(tmp_path)
    async with app.client(REMOTE) as client:
        assert (await client.get("/v1/models")).status_code == 200
        for path in ADMIN_PATHS:
            response = await client.post(path, json=LOAD)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_key_required")
        forwarded = await client.post("/load_lora_adapter", json=LOAD, headers={"x-forwarded-for": "127.0.0.1"})
        assert forwarded.status_code == 403
    assert list(app.engine.adapters) == ["sql"]
    async with app.client() as client:
        assert (await client.post("/load_lora_adapter", json=LOAD)).status_code == 200


@pytest.mark.parametrize("path", ADMIN_PATHS)
async def test_nothing_that_a_web_page_can_send_changes_the_server(tmp_path: Path, path: str) -> None:
    app = app_with(tmp_path)
    body = b'{"lora_name": "sql", "lora_path": "/x"}'
    json = {"content-type": "application/json"}
    async with app.client() as client:
        for headers, status in (
            (json | {"origin": "http://localhost:30000"}, 403),
            (json | {"origin": "null"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"content-type": "application/x-www-form-urlencoded"}, 415),
            ({}, 415),
        ):
            response = await client.post(path, content=body, headers=headers)
            assert response.status_code == status
            assert response.json()["error"]["message"]
    assert list(app.engine.adapters) == ["sql"]
    assert not app.engine.adapters["sql"].pinned


async def test_json_with_a_charset_is_json(tmp_path: Path) -> None:
    async with app_with(tmp_path).client() as client:
        headers = {"content-type": "application/json; charset=utf-8"}
        response = await client.post("/unload_lora_adapter", content=b'{"lora_name": "sql"}', headers=headers)
        assert response.status_code == 200


async def test_with_an_api_key_only_probes_go_without(tmp_path: Path) -> None:
    async with app_with(tmp_path, api_key="s3cret").client() as client:
        for path in ("/health", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for headers in (
            {},
            bearer("wrong"),
            bearer(""),
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
        ):
            for method, path in (("GET", "/v1/models"), ("POST", "/generate"), ("GET", "/get_model_info")):
                response = await client.request(method, path, headers=headers)
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/v1/models", headers=bearer("s3cret"))).status_code == 200
        assert (await client.get("/v1/models", headers={"authorization": "bearer s3cret"})).status_code == 200


async def test_with_an_api_key_alone_changes_need_it_and_this_machine(tmp_path: Path) -> None:
    app = app_with(tmp_path, api_key="s3cret")
    async with app.client() as client:
        assert (await client.post("/load_lora_adapter", json=LOAD)).status_code == 401
        assert (await client.post("/load_lora_adapter", json=LOAD, headers=bearer("s3cret"))).status_code == 200
    async with app.client(REMOTE) as client:
        assert (await client.post("/load_lora_adapter", json=LOAD, headers=bearer("s3cret"))).status_code == 403


async def test_the_admin_key_is_wanted_from_everywhere_and_serves_too(tmp_path: Path) -> None:
    app = app_with(tmp_path, api_key="s3cret", admin_api_key="böss")
    async with app.client(REMOTE) as client:
        for path in ADMIN_PATHS:
            for headers in ({}, bearer("s3cret")):
                assert (await client.post(path, json=LOAD, headers=headers)).status_code == 401
        admin_header = {b"authorization": "Bearer böss".encode()}
        assert (await client.post("/load_lora_adapter", json=LOAD, headers=admin_header)).status_code == 200
        assert (await client.get("/v1/models", headers=admin_header)).status_code == 200
    async with app.client() as client:
        assert (await client.post("/unload_lora_adapter", json={"lora_name": "sql"})).status_code == 401


OTHER_SITES = (
    {"origin": "https://example.com"},
    {"origin": "null"},
    {"origin": "http://test:81"},
    {"origin": "http://test", "sec-fetch-site": "cross-site"},
    {"origin": "http://test", "sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site"},
)
OWN_PAGE: tuple[dict[str, str], ...] = (
    {"origin": "http://test"},
    {"origin": "https://test"},  # a proxy ended the encryption
    {"origin": "https://front.example", "sec-fetch-site": "same-origin"},  # a proxy that replaced the Host
    {"sec-fetch-site": "none"},
)


async def test_with_an_admin_key_no_page_of_another_site_may_change_though_it_has_the_key(tmp_path: Path) -> None:
    app = app_with(tmp_path, admin_api_key="boss")
    async with app.client(LOCAL, **bearer("boss")) as client:
        for headers in OTHER_SITES:
            response = await client.post("/pin_lora_adapter", json={"lora_name": "sql"}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_refused")
        assert not app.engine.adapters["sql"].pinned
        for headers in OWN_PAGE:
            response = await client.post("/pin_lora_adapter", json={"lora_name": "sql"}, headers=headers)
            assert response.status_code == 200


NO_KEY: tuple[dict[str, str], ...] = ({}, {"authorization": "Bearer wrong"})


async def test_the_servers_own_page_needs_the_admin_key_too(tmp_path: Path) -> None:
    app = app_with(tmp_path, admin_api_key="boss")
    async with app.client() as client:
        for headers in OWN_PAGE:
            for key in NO_KEY:
                response = await client.post("/load_lora_adapter", json=LOAD, headers=headers | key)
                assert response.status_code == 401
    assert list(app.engine.adapters) == ["sql"]


@pytest.mark.parametrize("header", ["forwarded", "x-forwarded-for", "x-real-ip"])
async def test_a_proxy_on_this_machine_opens_nothing_without_an_admin_key(tmp_path: Path, header: str) -> None:
    app = app_with(tmp_path)
    async with app.client() as client:
        response = await client.post("/load_lora_adapter", json=LOAD, headers={header: "for=192.0.2.7"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_key_required")
    assert list(app.engine.adapters) == ["sql"]


@pytest.mark.parametrize("keys", [{}, {"admin_api_key": "boss"}])
async def test_a_name_that_was_made_to_point_here_opens_nothing(tmp_path: Path, keys: dict[str, str]) -> None:
    """DNS rebinding: the browser holds the page for the server's own, Host and Origin agree, the peer is local."""
    app = app_with(tmp_path, **keys)
    rebound = {"host": "evil.example:30000", "origin": "http://evil.example:30000", "sec-fetch-site": "same-origin"}
    async with app.client() as client:
        for path in ADMIN_PATHS:
            response = await client.post(path, json=LOAD, headers=rebound)
            assert response.status_code == (401 if keys else 403)
    assert list(app.engine.adapters) == ["sql"]


async def test_another_spelling_of_a_path_gets_round_nothing(tmp_path: Path) -> None:
    app = app_with(tmp_path, admin_api_key="boss")
    async with app.client() as client:
        for path in ("/load_lora_adapter%0A", "/load_lora_adapter/", "//load_lora_adapter", "/%6Coad_lora_adapter"):
            assert (await client.post(path, json=LOAD)).status_code in (401, 404, 405)
    assert list(app.engine.adapters) == ["sql"]


def test_every_route_but_probes_and_page_has_a_guard() -> None:
    settings = Settings(engine=EngineConfig(), api_key="k", admin_api_key="a")
    open_paths = {route.path for route in all_routes(settings) if isinstance(route, Route) and not _refuses(route)}
    assert open_paths == {"/health", "/metrics", "/", "/page/{file}"}


def _refuses(route: Route) -> bool:
    return type(route.app).__name__ == "Guard"


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:192.0.2.7", False),
        ("192.0.2.7", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_loopback_is_judged_by_the_address(host: str, wanted: bool) -> None:
    assert is_loopback((host, 1)) is wanted


def test_a_peer_that_is_not_known_is_not_this_machine() -> None:
    assert not is_loopback(None)


async def test_keys_never_reach_an_answer_or_a_repr(tmp_path: Path) -> None:
    app = app_with(tmp_path, api_key="s3cret", admin_api_key="boss")
    assert "s3cret" not in repr(app.settings)
    assert "boss" not in f"{app.settings}"
    async with app.client() as client:
        responses: list[httpx.Response] = [await client.get(path) for path in ("/v1/models", "/metrics", "/health")]
    assert not any("s3cret" in response.text for response in responses)

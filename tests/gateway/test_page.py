"""The page's files: how they are sent and kept, what they may load, and GET /status, which the page reads."""

import re
from pathlib import Path

import pytest

from engine.messages import AdapterStats, Stats
from gateway.routes.page import read_files
from gateway.status import server_status
from tests.gateway.app_harness import App, client_of, make_app
from tests.gateway.fake_engine import FakeEngine, model_info

NAMES = sorted(read_files())
PAGE = Path(__file__).parents[2] / "gateway" / "page"


@pytest.fixture
def app(tmp_path: Path) -> App:
    return make_app(tmp_path, FakeEngine(adapters=["sql"]), api_key="s3cret")


def address(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


def test_every_file_of_the_folder_is_served() -> None:
    assert [file.name for file in sorted(PAGE.iterdir())] == NAMES
    assert {"index.html", "page.css", "main.js", "icon.svg"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
async def test_files_go_out_without_a_key(app: App, name: str) -> None:
    async with client_of(app) as client:
        response = await client.get(address(name))
    assert response.status_code == 200
    assert response.content == (PAGE / name).read_bytes()
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("name", NAMES)
async def test_a_file_that_is_known_is_not_sent_again(app: App, name: str) -> None:
    async with client_of(app) as client:
        first = await client.get(address(name))
        assert first.headers["cache-control"] == "no-cache"
        etag = first.headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = await client.get(address(name), headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        for unknown in ('"other"', etag.strip('"'), ""):
            assert (await client.get(address(name), headers={"if-none-match": unknown})).status_code == 200
        head = await client.head(address(name))
        assert (head.status_code, head.headers["etag"]) == (200, etag)


async def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere(app: App) -> None:
    async with client_of(app) as client:
        policy = (await client.get("/")).headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert {rules[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert "unsafe" not in policy


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_host_or_writes_html(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"\w://|[\"'(`]//", text)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "cookie"):
        assert word not in text
    assert not re.search(r"<script(?! type=\"module\" src=)|<style| style=| on\w+=\"", text)


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nope.js", "/page/index.html", "/page/..%2Fapp.py", "/page/main.js%0A"]
)
async def test_other_paths_are_unknown(app: App, path: str) -> None:
    async with client_of(app) as client:
        response = await client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_route")


async def test_the_page_cannot_be_posted_to(app: App) -> None:
    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 405


def test_status_tells_arena_slots_and_the_bases_own_traffic() -> None:
    base = AdapterStats(name="", tier="none", pinned=False, rank=0, requests=7, generated_tokens=90, running=2)
    sql = AdapterStats(name="sql", tier="arena", pinned=True, rank=8, requests=5, generated_tokens=40)
    chunks = {"kv": 4, "prefix": 3, "adapter": 2, "free": 55}
    told = Stats(
        running=3, waiting=1, slots_used=2, slots_pinned=1, resident=6, chunks=chunks, tier_bytes={"host": 900},
        adapters=[sql, base],
    )  # fmt: skip
    answer = server_status(model_info(), told, alive=True, admin_key=True)
    assert (answer.engine, answer.admin_key, answer.adapters_resident, answer.host_bytes) == ("up", True, 6, 900)
    assert (answer.base.name, answer.base.requests_total, answer.base.generated_tokens) == ("llama", 7, 90)
    assert (answer.requests_running, answer.requests_waiting, answer.base.requests_running) == (3, 1, 2)
    arena = answer.arena
    assert (arena.kv, arena.prefix, arena.adapter, arena.free, arena.chunk_bytes) == (4, 3, 2, 55, 65536)
    assert (answer.slots.total, answer.slots.used, answer.slots.pinned) == (4, 2, 1)


def test_status_of_a_lost_engine_is_all_zeros() -> None:
    answer = server_status(model_info(), Stats(), alive=False, admin_key=False)
    assert (answer.engine, answer.arena.free, answer.slots.used, answer.base.requests_total) == ("down", 0, 0, 0)


async def test_status_is_guarded_as_the_models_are(app: App) -> None:
    async with client_of(app) as client:
        assert (await client.get("/status")).status_code == 401
        response = await client.get("/status", headers={"authorization": "Bearer s3cret"})
        assert response.status_code == 200
        assert (response.json()["engine"], response.json()["admin_key"]) == ("up", False)


async def test_status_says_when_the_engine_is_lost(app: App) -> None:
    app.engine.alive = False
    async with app.client(authorization="Bearer s3cret") as client:
        assert (await client.get("/status")).json()["engine"] == "down"

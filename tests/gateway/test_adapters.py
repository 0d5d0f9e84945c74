"""GET /v1/lora_adapters: what it tells, from fresh figures or without them, and what it keeps to itself."""

from pathlib import Path

import msgspec

from engine.messages import AdapterStats, Stats
from engine.types import AdapterInfo, AdapterState, EngineError, ErrorCode
from gateway.adapters import adapter_list
from tests.gateway.app_harness import make_app
from tests.gateway.fake_engine import FakeEngine

SQL = AdapterInfo(
    name="sql", adapter_id=1, source="/secret/sql", state=AdapterState.HOST, rank=8, modules=("q_proj",), bytes=4096,
    requests=1, created=10.0, error="cannot read /secret/sql",
)  # fmt: skip
BUSY = AdapterStats(
    name="sql", tier="arena", pinned=True, rank=16, requests=9, prompt_tokens=90, generated_tokens=45, waiting=2,
    running=3, state=AdapterState.RESIDENT, last_used=20.0,
)  # fmt: skip


class MuteEngine(FakeEngine):
    """Has no figures to give."""

    async def stats(self) -> Stats:
        raise EngineError(ErrorCode.ENGINE_DEAD, "the engine is not running")


def test_fresh_figures_win() -> None:
    (card,) = adapter_list("llama", [SQL], Stats(adapters=[BUSY])).data
    assert (card.id, card.state, card.tier, card.rank, card.pinned) == ("llama:sql", "resident", "arena", 16, True)
    assert (card.requests_running, card.requests_waiting, card.requests_total) == (3, 2, 9)
    assert (card.prompt_tokens, card.generated_tokens, card.created, card.last_used) == (90, 45, 10.0, 20.0)
    assert (card.modules, card.bytes) == (("q_proj",), 4096)


def test_without_figures_what_was_told_last_is_shown() -> None:
    (card,) = adapter_list("llama", [SQL], Stats()).data
    assert (card.state, card.tier, card.rank, card.requests_waiting, card.last_used) == ("host", "host", 8, 1, None)
    (cold,) = adapter_list("llama", [msgspec.structs.replace(SQL, state=AdapterState.COLD)], Stats()).data
    assert cold.tier == "none"


def test_no_path_of_the_server_is_told() -> None:
    assert b"secret" not in msgspec.json.encode(adapter_list("llama", [SQL], Stats(adapters=[BUSY])))


async def test_the_route_lists_all_adapters_as_openai_lists_models(tmp_path: Path) -> None:
    async with make_app(tmp_path, FakeEngine(adapters=["sql", "law"])).client() as client:
        answer = (await client.get("/v1/lora_adapters")).json()
    assert answer["object"] == "list"
    assert [(one["name"], one["object"]) for one in answer["data"]] == [
        ("sql", "lora_adapter"),
        ("law", "lora_adapter"),
    ]
    assert {"state", "tier", "rank", "modules", "bytes", "pinned", "last_used"} <= set(answer["data"][0])


async def test_it_answers_while_the_engine_is_away(tmp_path: Path) -> None:
    async with make_app(tmp_path, MuteEngine(adapters=["sql"])).client() as client:
        response = await client.get("/v1/lora_adapters")
    assert response.status_code == 200
    assert [one["name"] for one in response.json()["data"]] == ["sql"]


async def test_it_needs_the_key_that_the_models_need(tmp_path: Path) -> None:
    app = make_app(tmp_path, FakeEngine(adapters=["sql"]), api_key="k1")
    async with app.client() as client:
        assert (await client.get("/v1/lora_adapters")).status_code == 401
        keyed = await client.get("/v1/lora_adapters", headers={"authorization": "Bearer k1"})
    assert keyed.status_code == 200

"""Names resolve exactly or not at all."""

import msgspec
import pytest

from engine.types import AdapterState
from gateway.errors import ApiError
from gateway.models import ModelRegistry, ResolvedModel
from tests.gateway.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(adapters=["sql", "org/pirate"])


@pytest.fixture
def registry(engine: FakeEngine) -> ModelRegistry:
    return ModelRegistry(engine)


async def test_the_base(registry: ModelRegistry) -> None:
    assert await registry.resolve("llama") == ResolvedModel(id="llama", base="llama")


@pytest.mark.parametrize("name", ["llama:sql", "sql"])
async def test_an_adapter_by_its_served_id_and_by_its_bare_name(
    engine: FakeEngine, registry: ModelRegistry, name: str
) -> None:
    adapter_id = engine.adapters["sql"].adapter_id
    assert await registry.resolve(name) == ResolvedModel("llama:sql", "llama", "sql", adapter_id)


async def test_an_adapter_name_with_a_slash(registry: ModelRegistry) -> None:
    assert (await registry.resolve("llama:org/pirate")).adapter == "org/pirate"


@pytest.mark.parametrize(
    "name",
    [
        *("Llama", "llama ", " llama", "llama\n", "llama:", ":sql", ":", "llama:SQL", "llama:sql ", "llama: sql"),
        *("llama:sql\n", "llama:sql:", "llama:sql:sql", "llama:llama", "other:sql", "sql:llama", "sql\n", "nothing"),
        *("llama::sql", "llama/sql", "llama:../sql", "\x00llama"),
    ],
)
async def test_anything_else_is_not_found(registry: ModelRegistry, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        await registry.resolve(name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize("name", [None, ""])
async def test_no_name_is_an_error_and_not_the_base(registry: ModelRegistry, name: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        await registry.resolve(name)
    assert (caught.value.status, caught.value.param) == (400, "model")


async def test_a_draining_adapter_is_gone_for_new_requests(engine: FakeEngine, registry: ModelRegistry) -> None:
    draining = msgspec.structs.replace(engine.adapters["sql"], state=AdapterState.DRAINING)
    engine.adapters["sql"] = draining
    assert [card.id for card in registry.cards().data] == ["llama", "llama:org/pirate"]
    with pytest.raises(ApiError, match="sql"):
        await registry.resolve("llama:sql")


@pytest.mark.parametrize("state", [AdapterState.COLD, AdapterState.LOADING, AdapterState.FAILED])
async def test_the_engine_decides_about_adapters_that_are_not_loaded(
    engine: FakeEngine, registry: ModelRegistry, state: AdapterState
) -> None:
    engine.adapters["sql"] = msgspec.structs.replace(engine.adapters["sql"], state=state)
    assert (await registry.resolve("llama:sql")).adapter == "sql"


async def test_loads_and_unloads_show_at_once(engine: FakeEngine, registry: ModelRegistry) -> None:
    await engine.load_adapter("late", "/srv/secret/late")
    card = registry.card("llama:late")
    assert (card.root, card.parent, card.max_model_len) == ("late", "llama", 256)
    assert b"secret" not in msgspec.json.encode(registry.cards())
    await engine.unload_adapter("late")
    with pytest.raises(ApiError):
        registry.card("llama:late")

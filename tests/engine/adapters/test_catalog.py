"""Names, ids and states."""

import pytest

from engine.adapters.adapter import Adapter
from engine.adapters.catalog import Catalog
from engine.types import AdapterState, EngineError, ErrorCode


def refused(code: ErrorCode, match: str) -> "pytest.RaisesExc[EngineError]":
    return pytest.raises(EngineError, match=match, check=lambda error: error.code is code)


def test_ids_are_fresh_even_for_the_same_name() -> None:
    catalog = Catalog()
    seen = set()
    for _ in range(5):
        adapter, _ = catalog.begin_load("a", "x")
        seen.add(adapter.adapter_id)
        catalog.remove(adapter)
        catalog.check()
    assert len(seen) == 5


def test_ids_start_where_told() -> None:
    assert Catalog(first_id=1000).add("a", "x").adapter_id == 1000


def test_a_stale_id_is_refused() -> None:
    catalog = Catalog()
    adapter = catalog.add("a", "x")
    catalog.remove(adapter)
    with refused(ErrorCode.ADAPTER_NOT_FOUND, "not loaded any more"):
        catalog.for_request(adapter.adapter_id)
    assert catalog.find(adapter.adapter_id) is None


def test_identical_loads_share_one() -> None:
    catalog = Catalog()
    adapter, ours = catalog.begin_load("a", "x", revision="r")
    assert ours
    assert catalog.begin_load("a", "x", revision="r") == (adapter, False)


@pytest.mark.parametrize("other", [{"source": "y"}, {"revision": "r"}, {"pinned": True}, {"weight": 2.0}])
def test_another_load_of_a_loading_name_is_refused(other: dict[str, object]) -> None:
    catalog = Catalog()
    catalog.begin_load("a", "x")
    with refused(ErrorCode.ADAPTER_EXISTS, "'a' is being loaded already"):
        catalog.begin_load("a", **{"source": "x", **other})  # type: ignore[arg-type]


def test_a_loaded_or_listed_name_is_taken() -> None:
    catalog = Catalog()
    catalog.add("a", "x")
    with refused(ErrorCode.ADAPTER_EXISTS, "'a' is loaded already; unload it first"):
        catalog.begin_load("a", "x")
    with refused(ErrorCode.ADAPTER_EXISTS, "unload it first"):
        catalog.add("a", "y")


def test_a_draining_name_is_taken_and_serves_nobody() -> None:
    catalog = Catalog()
    adapter = catalog.add("a", "x")
    catalog.begin_unload("a")
    assert adapter.state is AdapterState.DRAINING
    with refused(ErrorCode.ADAPTER_EXISTS, "'a' is being unloaded"):
        catalog.begin_load("a", "x")
    with refused(ErrorCode.ADAPTER_NOT_FOUND, "'a' is being unloaded"):
        catalog.for_request(adapter.adapter_id)
    with refused(ErrorCode.ADAPTER_NOT_FOUND, "being unloaded already"):
        catalog.begin_unload("a")


def test_a_failed_adapter_gives_its_name_away() -> None:
    catalog = Catalog()
    old = catalog.add("a", "x")
    old.error = "gone"
    new, ours = catalog.begin_load("a", "y")
    assert ours
    assert new.adapter_id != old.adapter_id
    assert catalog.named("a") is new
    catalog.check()


def test_unknown_names_are_refused() -> None:
    with refused(ErrorCode.ADAPTER_NOT_FOUND, "'a' is not loaded"):
        Catalog().begin_unload("a")


def test_without_lora_a_load_says_how() -> None:
    with refused(ErrorCode.LORA_DISABLED, "--enable-lora"):
        Catalog(enabled=False).begin_load("a", "x")


def test_renewal_changes_the_id_alone() -> None:
    catalog = Catalog()
    adapter = catalog.add("a", "x")
    old = adapter.adapter_id
    catalog.renew(adapter)
    assert catalog.find(old) is None
    assert catalog.get(adapter.adapter_id) is adapter is catalog.named("a")
    catalog.check()


def adapter(**facts: object) -> Adapter:
    made = Adapter(1, "a", "x", None, False, 0.0)
    for name, value in facts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, AdapterState.COLD),
        ({"fetching": True}, AdapterState.LOADING),
        ({"on_host": True}, AdapterState.HOST),
        ({"on_host": True, "chunks": [1], "copying": True}, AdapterState.HOST),
        ({"on_host": True, "chunks": [1]}, AdapterState.RESIDENT),
        ({"on_host": True, "chunks": [1], "draining": True}, AdapterState.DRAINING),
        ({"error": "gone"}, AdapterState.FAILED),
        ({"error": "gone", "fetching": True}, AdapterState.LOADING),
        ({"error": "broken copy", "on_host": True}, AdapterState.FAILED),
    ],
)
def test_states_are_read_off_the_facts(facts: dict[str, object], state: AdapterState) -> None:
    made = adapter(**facts)
    assert made.state is state
    assert made.info(256).state is state


def test_info_tells_unix_seconds_and_bytes() -> None:
    made = adapter(created=2.0, used_at=5.0, pages=3)
    info = made.info(256, unix_offset=1000.0)
    assert (info.created, info.last_used, info.bytes) == (1002.0, 1005.0, 768)
    assert adapter().info(256, unix_offset=1000.0).last_used == 0.0

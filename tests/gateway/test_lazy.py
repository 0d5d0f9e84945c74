"""Adapters that are served on first use: what a name may reach, what is remembered, and for how long."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from engine.types import ADAPTER_FILES, AdapterInfo, AdapterState, EngineError, ErrorCode
from gateway.errors import ApiError
from gateway.lazy import ABSENT_NAMES, ABSENT_SECONDS, MISSING_SECONDS, MOST_LOOKUPS, AbsentNames, Lazy, Refusal
from gateway.models import ModelRegistry
from gateway.settings import SettingsError
from tests.gateway.fake_engine import FakeEngine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class HubEngine(FakeEngine):
    """Offers wait for the gate, and fail as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal: EngineError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def offer_adapter(self, name: str, source: str) -> AdapterInfo:
        info = await super().offer_adapter(name, source) if self.refusal is None else None
        if info is None:
            self.calls.append(("offer", {"name": name, "source": source}))
        await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        assert info is not None
        return info

    @property
    def offered(self) -> list[str]:
        return [str(call["source"]) for kind, call in self.calls if kind == "offer"]


@pytest.fixture
def engine() -> HubEngine:
    return HubEngine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    return root


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        (folder / name).write_text(name)
    return folder


def registry(engine: FakeEngine, root: Path | None, clock: Clock, patterns: Sequence[str] = ()) -> ModelRegistry:
    return ModelRegistry(engine, Lazy(root, patterns, clock))


async def served(models: ModelRegistry, name: str) -> bool:
    try:
        await models.resolve(name)
    except ApiError as error:
        if error.code != "model_not_found":
            raise
        return False
    return True


# Folders


@pytest.mark.parametrize("name", ["llama:sql", "sql"])
async def test_a_folder_is_served_by_its_name(engine: HubEngine, root: Path, clock: Clock, name: str) -> None:
    put(root / "sql")
    models = registry(engine, root, clock)
    model = await models.resolve(name)
    assert (model.id, model.adapter, model.adapter_id) == ("llama:sql", "sql", engine.adapters["sql"].adapter_id)
    assert await models.resolve(name) == model
    assert engine.offered == [str(root / "sql")]
    assert [card.id for card in models.cards().data] == ["llama", "llama:sql"]


async def test_what_merely_lies_there_is_not_listed(engine: HubEngine, root: Path, clock: Clock) -> None:
    put(root / "sql")
    models = registry(engine, root, clock)
    assert [card.id for card in models.cards().data] == ["llama"]
    with pytest.raises(ApiError):
        models.card("llama:sql")


@pytest.mark.parametrize(
    "name",
    [
        *("llama:SQL", "llama:sql ", "llama: sql", "llama:sql\n", "llama:sql:sql", "other:sql", "llama:sql/", "llama:"),
        *("llama:../adapters/sql", "llama:./sql", "llama:.", "llama:..", "llama:sql/..", "llama:/etc", "llama:.hidden"),
        *("llama:inner/deep", "llama:file", "llama:empty", "llama:\0", "llama:sql\0", "llama:" + "x" * 129),
    ],
)
async def test_no_other_name_reaches_a_folder(engine: HubEngine, root: Path, clock: Clock, name: str) -> None:
    for folder in ("sql", "inner/deep", ".hidden"):
        put(root / folder)
    (root / "file").touch()
    (root / "empty").mkdir()
    assert not await served(registry(engine, root, clock), name)
    assert engine.offered == []


async def test_links_may_lead_within_and_never_out(engine: HubEngine, root: Path, clock: Clock, tmp_path: Path) -> None:
    put(root / "sql")
    (root / "alias").symlink_to(root / "sql")
    outside = put(tmp_path / "outside")
    (root / "escape").symlink_to(outside)
    (root / "up").symlink_to(Path("..") / "outside")
    for folder, name in (("one", ADAPTER_FILES[0]), ("two", ADAPTER_FILES[1])):
        put(root / folder)
        (root / folder / name).unlink()
        (root / folder / name).symlink_to(outside / name)
    models = registry(engine, root, clock)
    assert await served(models, "alias")
    for name in ("escape", "up", "one", "two"):
        assert not await served(models, name)
    assert engine.offered == [str(root / "alias")]


async def test_a_root_that_is_a_link_is_fine(engine: HubEngine, root: Path, clock: Clock, tmp_path: Path) -> None:
    put(root / "sql")
    link = tmp_path / "link"
    link.symlink_to(root)
    assert await served(registry(engine, link, clock), "sql")


async def test_new_folders_are_seen_after_a_bounded_time(engine: HubEngine, root: Path, clock: Clock) -> None:
    models = registry(engine, root, clock)
    assert not await served(models, "sql")
    put(root / "sql")
    clock.now = ABSENT_SECONDS - 0.01
    assert not await served(models, "sql")
    clock.now = ABSENT_SECONDS
    assert await served(models, "sql")
    put(root / "other")
    assert await served(models, "other"), "a name that nobody asked for is not remembered"


@pytest.mark.parametrize("state", [AdapterState.COLD, AdapterState.FAILED])
async def test_a_folder_that_was_removed_is_a_404_once_it_left_memory(
    engine: HubEngine, root: Path, clock: Clock, state: AdapterState
) -> None:
    put(root / "sql")
    models = registry(engine, root, clock)
    assert await served(models, "sql")
    (root / "sql").rename(root.parent / "away")
    assert await served(models, "sql"), "it is in memory"
    engine.adapters["sql"] = msgspec.structs.replace(engine.adapters["sql"], state=state)
    assert not await served(models, "sql")
    assert "sql" not in engine.adapters
    assert not await served(models, "sql")


async def test_what_an_admin_put_in_a_folders_place_is_not_judged_by_it(
    engine: HubEngine, root: Path, clock: Clock
) -> None:
    put(root / "sql")
    models = registry(engine, root, clock)
    assert await served(models, "sql")
    info = await engine.load_adapter("sql", "/elsewhere", inplace=True)
    engine.adapters["sql"] = msgspec.structs.replace(info, state=AdapterState.COLD)
    (root / "sql").rename(root.parent / "away")
    assert await served(models, "sql")


async def test_what_an_admin_loaded_is_not_judged_by_the_folder(engine: HubEngine, root: Path, clock: Clock) -> None:
    models = registry(engine, root, clock)
    info = await engine.load_adapter("sql", "/elsewhere")
    engine.adapters["sql"] = msgspec.structs.replace(info, state=AdapterState.COLD)
    assert await served(models, "sql")


# The hub


async def test_only_what_a_pattern_allows_is_ever_asked_of_the_hub(engine: HubEngine, clock: Clock) -> None:
    models = registry(engine, None, clock, ["acme/*", "lab/sql-?", "lab/[xy]"])
    for name in ("acme/sql", "llama:acme/other", "lab/sql-1", "lab/x"):
        assert await served(models, name)
    allowed = ["hub:acme/sql", "hub:acme/other", "hub:lab/sql-1", "hub:lab/x"]
    assert engine.offered == allowed
    for name in (
        *(
            "acme",
            "acme/",
            "/acme/x",
            "acme/a/b",
            "acme/../x",
            "acme/..",
            "evil/acme",
            "evilacme/x",
            "acme2/x",
            "ACME/x",
        ),
        *(
            "lab/sql-12",
            "lab/sql-",
            "lab/z",
            "acme/x\n",
            "acme/x ",
            "acme/.x",
            "acme/x:y",
            "other:acme/x",
            "hub:acme/x",
        ),
    ):
        assert not await served(models, name)
    assert engine.offered == allowed


@pytest.mark.parametrize("pattern", ["*", "acme", "/x", "acme/", "a/b/c", "acme/x y", "", "../x/*"])
def test_patterns_that_are_none_are_refused(pattern: str, clock: Clock) -> None:
    with pytest.raises(SettingsError, match="--lora-hub-allow"):
        Lazy(None, [pattern], clock)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(SettingsError, match="--lora-dir"):
        Lazy(tmp_path / "none", [], clock)


async def test_a_repository_that_is_missing_is_a_404_and_is_asked_for_again_later(
    engine: HubEngine, clock: Clock
) -> None:
    models = registry(engine, None, clock, ["acme/*"])
    engine.refusal = EngineError(ErrorCode.ADAPTER_NOT_FOUND, "no such repository")
    for _ in range(3):
        assert not await served(models, "acme/sql")
    assert len(engine.offered) == 1
    clock.now = MISSING_SECONDS
    engine.refusal = None
    assert await served(models, "acme/sql")


async def test_a_hub_that_fails_is_a_503_that_is_remembered(engine: HubEngine, clock: Clock) -> None:
    models = registry(engine, None, clock, ["acme/*"])
    engine.refusal = EngineError(ErrorCode.ADAPTER_UNAVAILABLE, "the hub did not deliver within 120 s")
    for _ in range(2):
        with pytest.raises(ApiError, match="did not deliver") as failed:
            await models.resolve("acme/sql")
        assert (failed.value.status, failed.value.code) == (503, "adapter_unavailable")
    assert len(engine.offered) == 1


async def test_a_dead_engine_is_not_remembered(engine: HubEngine, clock: Clock) -> None:
    models = registry(engine, None, clock, ["acme/*"])
    engine.refusal = EngineError(ErrorCode.ENGINE_DEAD, "the engine is not running")
    with pytest.raises(EngineError):
        await models.resolve("acme/sql")
    engine.refusal = None
    assert await served(models, "acme/sql")


async def test_many_who_ask_at_once_wait_for_one_lookup(engine: HubEngine, clock: Clock) -> None:
    models = registry(engine, None, clock, ["acme/*"])
    engine.gate.clear()
    engine.refusal = EngineError(ErrorCode.ADAPTER_NOT_FOUND, "none")
    asking = [asyncio.create_task(served(models, "acme/sql")) for _ in range(20)]
    await asyncio.sleep(0)
    asking[0].cancel()
    engine.gate.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert results[1:] == [False] * 19
    assert len(engine.offered) == 1


async def test_lookups_of_repositories_are_bounded_and_folders_do_not_wait_for_them(
    engine: HubEngine, root: Path, clock: Clock
) -> None:
    models = registry(engine, root, clock, ["acme/*"])
    engine.gate.clear()
    engine.refusal = EngineError(ErrorCode.ADAPTER_NOT_FOUND, "none")
    asking = [asyncio.create_task(served(models, f"acme/{i}")) for i in range(MOST_LOOKUPS)]
    while len(engine.offered) < MOST_LOOKUPS:  # noqa: ASYNC110 - turns of the loop are all it takes
        await asyncio.sleep(0)
    with pytest.raises(ApiError, match="Too many") as failed:
        await models.resolve("acme/more")
    assert (failed.value.status, failed.value.headers["retry-after"]) == (503, "1")
    assert not await served(models, "none")
    engine.gate.set()
    assert await asyncio.gather(*asking) == [False] * MOST_LOOKUPS
    assert not await served(models, "acme/more")


def test_names_remembered_are_bounded_and_the_oldest_go() -> None:
    absent, refusal = AbsentNames(ABSENT_NAMES), Refusal(None)
    for i in range(ABSENT_NAMES + 10):
        absent.add(str(i), refusal, 5.0)
    assert len(absent) == ABSENT_NAMES
    assert absent.find("9", 0.0) is None
    assert absent.find("10", 0.0) is refusal
    assert absent.find("10", 5.0) is None
    assert len(absent) == ABSENT_NAMES - 1

"""Fetches from the hub: one for the same repository, few at a time, given up after a time, remembered."""

import asyncio
import threading
from pathlib import Path

import pytest

from engine.adapters.hub import Hub
from engine.adapters.snapshot import RepositoryMissing
from engine.types import ADAPTER_FILES, EngineError, ErrorCode


class FakeHub:
    """Stands in for `fetch_from_hub`; answers when the gate is open."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, str | None]] = []
        self.called = asyncio.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.most = self.now = 0
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()

    def __call__(self, repo: str, revision: str | None) -> Path:
        with self._lock:
            self.calls.append((repo, revision))
            self.now += 1
            self.most = max(self.most, self.now)
        self._loop.call_soon_threadsafe(self.called.set)
        assert self.gate.wait(30)
        with self._lock:
            self.now -= 1
        if "missing" in repo:
            raise RepositoryMissing(f"{repo}: none")
        if "fault" in repo:
            raise RuntimeError("broken\npipe")
        folder = self.root / repo
        folder.mkdir(parents=True, exist_ok=True)
        for name in ADAPTER_FILES:
            (folder / name).touch()
        return folder


@pytest.fixture
async def fake(tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path)


async def test_the_same_repository_is_fetched_once_for_all_who_wait(fake: FakeHub) -> None:
    hub = Hub(fetch=fake)
    fake.gate.clear()
    waiting = [asyncio.create_task(hub.resolve("o/a", None, again=True)) for _ in range(5)]
    await fake.called.wait()
    fake.gate.set()
    assert set(await asyncio.gather(*waiting)) == {str(fake.root / "o/a")}
    assert fake.calls == [("o/a", None)]


async def test_what_comes_back_needs_no_hub_while_its_files_are_there(fake: FakeHub) -> None:
    hub = Hub(fetch=fake)
    folder = Path(await hub.resolve("hub:o/a", "main", again=True))
    assert await hub.resolve("o/a", "main", again=False) == str(folder)
    assert fake.calls == [("o/a", "main")]
    await hub.resolve("o/a", "v2", again=False)
    await hub.resolve("o/a", "main", again=True)
    (folder / ADAPTER_FILES[0]).unlink()
    await hub.resolve("o/a", "main", again=False)
    assert fake.calls == [("o/a", "main"), ("o/a", "v2"), ("o/a", "main"), ("o/a", "main")]


async def test_a_hub_that_hangs_is_given_up_and_what_it_brings_late_is_kept(fake: FakeHub) -> None:
    hub = Hub(0.01, fetch=fake)
    fake.gate.clear()
    with pytest.raises(EngineError, match=r"o/a: the hub did not deliver within 0\.01 s") as failed:
        await hub.resolve("o/a", None, again=True)
    assert failed.value.code is ErrorCode.ADAPTER_UNAVAILABLE
    (fetch,) = hub._fetches.values()
    fake.gate.set()
    await fetch
    assert await hub.resolve("o/a", None, again=False) == str(fake.root / "o/a")
    assert len(fake.calls) == 1


async def test_few_at_a_time(fake: FakeHub) -> None:
    hub = Hub(threads=2, fetch=fake)
    await asyncio.gather(*(hub.resolve(f"o/a{i}", None, again=True) for i in range(10)))
    assert len(fake.calls) == 10
    assert fake.most <= 2


async def test_failures_are_told_and_not_remembered(fake: FakeHub) -> None:
    hub = Hub(fetch=fake)
    for _ in range(2):
        with pytest.raises(RepositoryMissing, match="o/missing: none"):
            await hub.resolve("o/missing", None, again=False)
    with pytest.raises(EngineError, match="RuntimeError: broken") as failed:
        await hub.resolve("o/fault", None, again=False)
    assert failed.value.code is ErrorCode.ADAPTER_INVALID
    assert len(fake.calls) == 3


async def test_folders_are_no_business_of_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    hub = Hub(fetch=fake)
    assert await hub.resolve(str(tmp_path), None, again=True) == str(tmp_path)
    with pytest.raises(EngineError, match="no such folder"):
        await hub.resolve("/no/such/folder", None, again=True)
    assert fake.calls == []


async def test_hub_means_the_hub_where_a_folder_has_the_same_name(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub = Hub(fetch=fake)
    assert await hub.resolve("o/a", None, again=True) == "o/a"
    await hub.resolve("hub:o/a", None, again=True)
    assert fake.calls == [("o/a", None)]
    for source in ("hub:", "hub:/etc", "hub:../a", "hub:o/a/b", "hub:o/a\n"):
        with pytest.raises(EngineError):
            await hub.resolve(source, None, again=True)
    assert len(fake.calls) == 1

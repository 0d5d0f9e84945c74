import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    DryRunError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.adapters.snapshot import RepositoryMissing, fetch_from_hub
from engine.adapters.source import open_adapter_file, refuse_outside, resolve_source
from engine.types import ADAPTER_FILES, CONFIG_FILE, TENSORS_FILE, EngineError, ErrorCode


def refused(source: str, revision: str | None = None) -> str:
    with pytest.raises(EngineError) as caught:
        resolve_source(source, revision)
    assert caught.value.code is ErrorCode.ADAPTER_INVALID
    return caught.value.message


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my..adapter"
    folder.mkdir()
    assert resolve_source(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_source("./my..adapter") == folder
    assert resolve_source("my..adapter") == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/my..adapter") == folder


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "is empty"),
        ("x" * 2000, "longer than"),
        ("../adapter", "'..' is not allowed"),
        ("/srv/adapters/../../etc", "'..' is not allowed"),
        ("..", "'..' is not allowed"),
        ("a\\..\\b", "'..' is not allowed"),
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("https://example.org/adapter", "URLs are not supported"),
        ("file:///srv/adapter", "URLs are not supported"),
        ("file:/srv/adapter", "URLs are not supported"),
        ("s3://bucket/adapter", "URLs are not supported"),
        ("HTTP://example.org", "URLs are not supported"),
        ("/no/such/folder", "no such folder"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("~no-such-user-here/x", "no such folder"),
        ("y" * 300, "neither a local folder nor a hub repository"),
    ],
)
def test_refused_sources(source: str, reason: str) -> None:
    assert reason in refused(source)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not a folder" in refused(str(tmp_path / "file"))


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert "a hub repository only" in refused(str(tmp_path), "main")


SIZES: dict[str, int | None] = {CONFIG_FILE: 500, TENSORS_FILE: 10_000}


class Hub:
    """Stands in for `snapshot_download`: answers with a folder or raises; a dry run tells of files and their sizes.

    One that is out of reach has what is in the cache.
    """

    def __init__(
        self, answer: Path | Exception, sizes: dict[str, int | None] = SIZES, away: Exception | None = None
    ) -> None:
        self.answer = answer
        self.sizes = sizes
        self.away = away
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **arguments: Any) -> Any:
        self.calls.append({"repo": repo, **arguments})
        if arguments.get("dry_run"):
            if self.away is not None:
                raise DryRunError("no") from self.away
            return [SimpleNamespace(commit_hash="c0ffee", file_size=n, filename=name) for name, n in self.sizes.items()]
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_fetches_two_files_of_the_commit_whose_sizes_were_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_source("owner/adapter", "abc123") == tmp_path
    wanted = {"repo": "owner/adapter", "allow_patterns": list(ADAPTER_FILES)}
    assert hub.calls == [wanted | {"revision": "abc123", "dry_run": True}, wanted | {"revision": "c0ffee"}]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({CONFIG_FILE: 500, TENSORS_FILE: 501}, "1,001 bytes; at most 1,000 are fetched (--max-lora-hub-bytes)"),
        ({CONFIG_FILE: 500, TENSORS_FILE: None}, f"does not tell how large {TENSORS_FILE} is"),
        ({CONFIG_FILE: 500}, f"has no {TENSORS_FILE}"),
    ],
)
def test_nothing_is_fetched_that_is_too_large_or_no_adapter(
    sizes: dict[str, int | None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, sizes)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(EngineError, match=re.escape(reason)):
        fetch_from_hub("owner/adapter", None, 1000)
    assert [call.get("dry_run") for call in hub.calls] == [True]


def test_a_repository_without_an_adapter_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, {}))
    with pytest.raises(RepositoryMissing, match="there is no adapter in this hub repository"):
        fetch_from_hub("owner/model", None)


def test_a_hub_out_of_reach_leaves_what_was_fetched_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, away=ConnectionError("down"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_source("owner/adapter") == tmp_path
    assert hub.calls[1]["local_files_only"], "sizes were not told, so nothing is fetched"
    hub.answer = LocalEntryNotFoundError("not cached")
    assert "the hub cannot be reached (down)" in refused("owner/adapter")


def without_response(kind: type[Exception]) -> Exception:
    """The hub's errors want a response of its HTTP library, which nobody here looks at."""
    return kind.__new__(kind, "404")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (without_response(RepositoryNotFoundError), "neither a local folder nor a hub repository"),
        (
            without_response(RevisionNotFoundError),
            "owner/adapter at revision v9: the hub repository has no such",
        ),
        (OfflineModeIsEnabled("offline\nsecond line"), "the hub cannot be reached (offline)"),
        (ConnectionError(), "the hub cannot be reached (ConnectionError)"),
        (OSError(28, "No space left on device", "/root/.cache/x"), "to the hub's cache (No space left on device)"),
    ],
)
def test_what_the_hub_refuses(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for hub in (Hub(error), Hub(LocalEntryNotFoundError("not cached"), away=error)):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        assert reason in refused("owner/adapter", "v9")


def unopened(folder: Path, name: str = TENSORS_FILE, max_bytes: int | None = None) -> str:
    with pytest.raises(EngineError) as caught:
        open_adapter_file(folder, name, max_bytes)
    assert caught.value.code is ErrorCode.ADAPTER_INVALID
    assert str(folder) not in caught.value.message
    return caught.value.message


def test_links_to_regular_files_are_fine(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"bytes")
    (tmp_path / TENSORS_FILE).symlink_to(tmp_path / "blob")
    with open_adapter_file(tmp_path, TENSORS_FILE) as stream:
        assert stream.read() == b"bytes"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    assert "is not a regular file" in unopened(tmp_path, CONFIG_FILE)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / TENSORS_FILE).symlink_to(tmp_path / "fifo")
    assert "is not a regular file" in unopened(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    (tmp_path / TENSORS_FILE).symlink_to("/dev/zero")
    assert "is not a regular file" in unopened(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    (tmp_path / TENSORS_FILE).symlink_to(tmp_path / TENSORS_FILE)
    assert "cannot be read" in unopened(tmp_path)


def test_missing_files_are_explained(tmp_path: Path) -> None:
    assert "has no adapter_config.json" in unopened(tmp_path, CONFIG_FILE)
    assert "has no adapter_model.safetensors" in unopened(tmp_path)
    (tmp_path / f"{TENSORS_FILE}.index.json").touch()
    assert "split into several files" in unopened(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    assert "only adapter_model.bin, a pickle, which is never opened" in unopened(tmp_path)


def test_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b" " * 11)
    assert "has 11 bytes; at most 10 are read" in unopened(tmp_path, CONFIG_FILE, 10)


def test_links_out_of_the_folder_of_adapters_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", root / "linked", outside):
        folder.mkdir(parents=True)
        for name in ADAPTER_FILES:
            (folder / name).touch()
    (root / "alias").symlink_to(root / "good")
    (root / "escape").symlink_to(outside)
    (root / "linked" / TENSORS_FILE).unlink()
    (root / "linked" / TENSORS_FILE).symlink_to(outside / TENSORS_FILE)
    refuse_outside(root / "good", root)
    refuse_outside(root / "alias", root)
    for name in ("escape", "linked"):
        with pytest.raises(EngineError, match="leads out of --lora-dir") as caught:
            refuse_outside(root / name, root)
        assert str(tmp_path) not in caught.value.message

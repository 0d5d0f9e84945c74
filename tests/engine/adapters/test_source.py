import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.adapters.source import (
    ADAPTER_FILES,
    CONFIG_FILE,
    TENSORS_FILE,
    open_adapter_file,
    refuse_outside,
    resolve_source,
)
from engine.types import EngineError, ErrorCode


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


class Hub:
    """Stands in for `snapshot_download`: answers with a folder or raises."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **arguments: Any) -> str:
        self.calls.append({"repo": repo, **arguments})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_fetches_two_files_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_source("owner/adapter", "abc123") == tmp_path
    assert hub.calls == [{"repo": "owner/adapter", "revision": "abc123", "allow_patterns": list(ADAPTER_FILES)}]


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
        (LocalEntryNotFoundError("offline\nsecond line"), "the hub cannot be reached (offline)"),
        (ConnectionError(), "the hub cannot be reached (ConnectionError)"),
    ],
)
def test_what_the_hub_refuses(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(error))
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

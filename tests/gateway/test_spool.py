"""Folders of uploads: staged, committed, swept, and held by one server at a time."""

from collections.abc import Collection
from pathlib import Path

import pytest

from gateway.settings import SettingsError
from gateway.spool import LOCK, STAGING, TEMPORARY, Spool, default_root, new_token


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK}


def opened(root: Path, token: str | None, keep: Collection[str] = ()) -> Spool:
    spool = Spool(root, token)
    spool.open(keep)
    return spool


def upload(spool: Spool, text: str = "weights") -> str:
    staged = spool.stage()
    (staged / "file").write_text(text)
    return spool.commit(staged)


def test_an_upload_becomes_a_source_by_its_commit(tmp_path: Path) -> None:
    spool = opened(tmp_path, new_token())
    staged = spool.stage()
    assert staged.name.endswith(STAGING)
    (staged / "file").write_text("weights")
    assert spool.token_of(str(staged)) is None
    token = spool.commit(staged)
    assert (spool.path(token) / "file").read_text() == "weights"
    assert spool.token_of(str(spool.path(token))) == token
    assert names(spool.folder) == {token}
    spool.remove(token)
    spool.remove(token)
    assert names(spool.folder) == set()


def test_what_is_no_upload_has_no_token(tmp_path: Path) -> None:
    spool = opened(tmp_path, new_token())
    for source in (f"/elsewhere/{new_token()}", "owner/adapter", str(spool.folder / "adapter"), str(spool.folder)):
        assert spool.token_of(source) is None


def test_what_is_not_kept_goes_at_the_next_start(tmp_path: Path) -> None:
    token = new_token()
    spool = opened(tmp_path, token)
    kept, forgotten, staged = upload(spool), upload(spool), spool.stage()
    (spool.folder / "notes.txt").write_text("not ours")
    spool.close()
    spool = opened(tmp_path, token, {kept})
    assert names(spool.folder) == {kept, "notes.txt"}
    assert not staged.exists()
    assert not spool.path(forgotten).exists()


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    token = new_token()
    first = opened(tmp_path, token)
    with pytest.raises(SettingsError, match="another server"):
        opened(tmp_path, token)
    first.close()
    opened(tmp_path, token).close()


def test_temporary_spools_end_with_their_server_or_with_the_next_one(tmp_path: Path) -> None:
    ended, killed = opened(tmp_path, None), opened(tmp_path, None)
    upload(ended)
    upload(killed)
    ended.close()
    assert not ended.folder.exists()
    living = opened(tmp_path, None)
    token = upload(living)
    assert killed._lock is not None
    killed._lock.close()  # what a kill leaves
    opened(tmp_path, new_token()).close()
    assert not killed.folder.exists()
    assert (living.path(token) / "file").exists()
    assert living.folder.name.startswith(TEMPORARY)


def test_what_others_left_or_take_away_meanwhile_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}file").touch()
    (tmp_path / f"{TEMPORARY}link").symlink_to(tmp_path / "gone")
    upload(opened(tmp_path, None))


def test_a_temporary_spool_is_made_for_the_first_upload(tmp_path: Path) -> None:
    root = tmp_path / "root"
    spool = Spool(root)
    spool.close()
    assert not root.exists()
    token = upload(spool)
    assert spool.path(token).is_dir()


def test_a_root_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="--lora-spool-dir"):
        opened(tmp_path / "file", None)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    spool = opened(tmp_path / "root", None)
    for folder in (tmp_path / "root", spool.folder, spool.stage()):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_it_lies_in_the_cache_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", "/caches/mine")
    assert default_root() == Path("/caches/mine/spool")
    monkeypatch.delenv("LORAMUX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_root() == Path("/caches/loramux/spool")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache" / "loramux" / "spool"

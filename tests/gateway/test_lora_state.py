"""The state of --lora-state: what each change makes of it, and its file."""

from pathlib import Path

import msgspec
import pytest

from engine.config import LoraPath
from gateway.lora_state import Loaded, State, fresh, read, start_paths, with_loaded, with_pin, without, write
from gateway.settings import SettingsError
from gateway.spool import new_token

PATHS = (LoraPath(name="a", path="/a"), LoraPath(name="b", path="/b", pinned=True))


def names(paths: tuple[LoraPath, ...]) -> list[tuple[str, bool]]:
    return [(path.name, path.pinned) for path in paths]


def test_loads_are_kept_in_order_and_a_load_in_place_keeps_its_place() -> None:
    state = fresh()
    for name in ("x", "y", "z"):
        state = with_loaded(state, Loaded(name=name, source=name), PATHS)
    state = with_loaded(state, Loaded(name="y", source="new"), PATHS)
    assert [(entry.name, entry.source) for entry in state.adapters] == [("x", "x"), ("y", "new"), ("z", "z")]
    state = without(state, "x", PATHS)
    assert [entry.name for entry in state.adapters] == ["y", "z"]
    assert start_paths(state, PATHS) == PATHS


def test_pins_of_loaded_adapters_are_kept() -> None:
    state = with_loaded(fresh(), Loaded(name="x", source="s"), PATHS)
    state = with_pin(state, "x", True, PATHS)
    entry = state.named("x")
    assert entry is not None
    assert entry.pinned
    assert with_pin(state, "unknown", True, PATHS) == state


def test_what_the_api_changed_about_the_flags_adapters_stays_while_the_flag_does() -> None:
    state = with_pin(without(fresh(), "a", PATHS), "b", False, PATHS)
    assert names(start_paths(state, PATHS)) == [("b", False)]
    moved = (LoraPath(name="a", path="/elsewhere"), LoraPath(name="b", path="/elsewhere", pinned=True))
    assert start_paths(state, moved) == moved


def test_a_name_that_was_given_away_is_the_apis() -> None:
    state = with_loaded(without(fresh(), "a", PATHS), Loaded(name="a", source="other"), PATHS)
    assert names(start_paths(state, PATHS)) == [("b", True)]
    moved = (LoraPath(name="a", path="/elsewhere"),)
    assert start_paths(state, moved) == ()
    assert start_paths(without(state, "a", moved), moved) == ()


def test_a_file_holds_it_all(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    assert read(file) is None
    state = with_loaded(fresh(), Loaded(name="x", upload=new_token(), pinned=True, weight=2.5), PATHS)
    state = with_loaded(state, Loaded(name="o/y", source="owner/y", revision="main"), PATHS)
    state = with_pin(state, "b", False, PATHS)
    write(file, state)
    assert read(file) == state
    write(file, fresh())
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    old = fresh()
    write(file, old)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(file, fresh())
    assert read(file) == old
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def doctored(**changes: object) -> bytes:
    return msgspec.json.encode({**msgspec.to_builtins(fresh()), "spool": "0" * 32, **changes})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        doctored()[:-3],
        doctored(version=2),
        doctored(surprise=1),
        doctored(spool="../up"),
        doctored(spool="0" * 32 + "\n"),
        doctored(adapters=[{"name": "x", "upload": "/etc"}]),
        doctored(adapters=[{"name": "x\n", "source": "s"}]),
        doctored(adapters=[{"name": "x", "source": "s", "weight": 0}]),
        doctored(adapters=[{"source": "s"}]),
    ],
)
def test_a_file_that_is_something_else_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "state.json"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"--lora-state .*no state that loramux wrote"):
        read(file)
    assert file.read_bytes() == content


def test_a_folder_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read(tmp_path)


def test_uploads_are_those_of_the_adapters() -> None:
    token = new_token()
    state: State = with_loaded(fresh(), Loaded(name="x", upload=token), ())
    assert with_loaded(state, Loaded(name="y", source="s"), ()).uploads == {token}

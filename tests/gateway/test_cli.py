"""Flags to settings: defaults, names, refusals before anything is loaded."""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import gateway
from engine.config import EngineConfig, LoraPath
from engine.models.dims import LORA_MODULES as ENGINE_MODULES
from gateway import cli
from gateway.flags import build_parser, byte_size
from gateway.lora_paths import demo_adapters, name_problem, parse_lora_paths
from gateway.settings import Settings, SettingsError


def settings(*flags: str, **environ: str) -> Settings:
    return cli.settings_from(build_parser().parse_args(["serve", *flags]), environ)


def refusal(*flags: str, **environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        settings(*flags, **environ)
    return str(caught.value)


def folder(path: Path) -> str:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return str(path)


def test_defaults_are_sglangs() -> None:
    chosen = settings("--model-path", "org/model")
    assert (chosen.host, chosen.port, chosen.sampling_defaults) == ("127.0.0.1", 30000, "model")
    assert chosen.engine == EngineConfig(model_path="org/model", served_model_name="org/model")


def test_without_a_model_it_is_the_demo_with_the_repositorys_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gateway" / "__init__.py"
    monkeypatch.setattr(gateway, "__file__", str(package))
    assert settings().engine == EngineConfig()
    for name in ("lora10", "lora2", "loras", "other"):
        folder(tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "lora3").mkdir()  # holds no adapter
    engine = settings().engine
    assert engine.model_path is None
    assert engine.served_model_name == "llama"
    assert [entry.name for entry in engine.lora_paths] == ["lora2", "lora10"]
    assert engine.enable_lora
    assert settings("--lora-paths").engine.lora_paths == ()
    assert settings("--model-path", "org/model").engine.lora_paths == ()


def test_adapters_are_found_by_their_numbers(tmp_path: Path) -> None:
    assert demo_adapters(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--model-path", "org/model"), "org/model"),
        (("--model", "model"), "model"),
        (("--model-path", "{tmp}/some.model"), "some.model"),
        (("--model-path", "{tmp}/some.model/"), "some.model"),
        (("--model-path", "/no/such/folder"), "folder"),
        (("--model-path", "org/model", "--served-model-name", "llama-3"), "llama-3"),
    ],
)
def test_the_served_name(flags: tuple[str, ...], name: str, tmp_path: Path) -> None:
    (tmp_path / "some.model").mkdir()
    assert settings(*(flag.format(tmp=tmp_path) for flag in flags)).engine.served_model_name == name


@pytest.mark.parametrize("name", ["", "a:b", " a", "a\nb"])
def test_names_that_no_base_can_have(name: str) -> None:
    assert "--served-model-name" in refusal("--served-model-name", name)


def test_lora_paths_in_all_their_forms(tmp_path: Path) -> None:
    local = folder(tmp_path / "a=b" / "pirate")
    given = (
        "sql=org/sql-lora",
        "org/bare",
        '{"lora_name": "json", "lora_path": "org/x", "pinned": true}',
        '[{"lora_name": "rev", "lora_path": "org/y", "revision": "v1", "weight": 3}]',
        f"local={local}",
    )
    chosen = settings("--lora-paths", *given, "--lora-paths", "again=org/z").engine
    assert chosen.lora_paths == (
        LoraPath(name="sql", path="org/sql-lora"),
        LoraPath(name="bare", path="org/bare"),
        LoraPath(name="json", path="org/x", pinned=True),
        LoraPath(name="rev", path="org/y", revision="v1", weight=3.0),
        LoraPath(name="local", path=local),
        LoraPath(name="again", path="org/z"),
    )
    assert chosen.enable_lora
    assert parse_lora_paths([folder(tmp_path / "bare")], "llama")[0].name == "bare"


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ("=org/x", "''"),
        ("a=", "no path"),
        ("..=org/x", "'..'"),
        ("a/../b=org/x", "'a/../b'"),
        ("/a=org/x", "'/a'"),
        ("a b=org/x", "'a b'"),
        ("a:b=org/x", "'a:b'"),
        ("llama=org/x", "base model's name"),
        ("a=/no/such/folder", "no folder"),
        ("a=./nothing", "no folder"),
        ("/no/such/folder", "no folder"),
        ("{", "JSON"),
        ('{"lora_name": "a"}', "lora_path"),
        ('{"lora_name": "a", "lora_path": "b", "pin": true}', "pin"),
        ('{"lora_name": "a", "lora_path": "b", "pinned": "yes"}', "pinned"),
        ("sql=org/one", "two adapters"),
    ],
)
def test_lora_paths_that_are_refused(entry: str, word: str) -> None:
    message = refusal("--lora-paths", "sql=org/sql", entry)
    assert message.startswith("--lora-paths:")
    assert word in message


def test_a_file_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal("--lora-paths", f"a={tmp_path / 'file'}")


@pytest.mark.parametrize("name", ["a", "a/b", "A-1_x.y", "x" * 128])
def test_names_that_an_adapter_can_have(name: str) -> None:
    assert name_problem(name, "llama") is None


def test_combinations_that_cannot_be_served() -> None:
    assert "--max-loras-per-batch 4" in refusal("--max-loaded-loras", "3", "--max-loras-per-batch", "4")
    assert "--tp-size 1" in refusal("--tp-size", "2")
    assert "--lora-backend torch" in refusal("--lora-backend", "triton", "--device", "cpu")
    pinned = '{"lora_name": "a", "lora_path": "org/a", "pinned": true}'
    assert "pinned" in refusal("--lora-paths", pinned, "--max-loras-per-batch", "1")
    assert settings("--lora-paths", pinned, "--max-loras-per-batch", "2").engine.lora_paths[0].pinned
    assert settings("--max-loaded-loras", "4", "--max-loras-per-batch", "4").engine.max_loaded_loras == 4
    paths = [f"a{i}=org/a{i}" for i in range(12)]
    chosen = settings("--max-loaded-loras", "8", "--lora-paths", *paths)  # the rest load when named
    assert len(chosen.engine.lora_paths) == 12


def test_target_modules() -> None:
    assert cli.LORA_MODULES == ENGINE_MODULES
    for all_of_them in (["all"], ["q_proj", "all"]):
        assert settings("--lora-target-modules", *all_of_them).engine.lora_target_modules == ENGINE_MODULES
    assert settings("--lora-target-modules", "v_proj", "q_proj").engine.lora_target_modules == ("q_proj", "v_proj")
    assert settings().engine.lora_target_modules is None
    assert "lm_head" in refusal("--lora-target-modules", "q_proj", "lm_head")
    assert "names no module" in refusal("--lora-target-modules")


def test_keys_come_from_flags_or_the_environment() -> None:
    environ = {"LORAMUX_API_KEY": "one", "LORAMUX_ADMIN_API_KEY": "two"}
    chosen = settings(**environ)
    assert (chosen.api_key, chosen.admin_api_key) == ("one", "two")
    assert settings("--api-key", "three", **environ).api_key == "three"
    assert settings().api_key is None
    for flags_, given in ((("--api-key", ""), {}), ((), {"LORAMUX_API_KEY": " "}), (("--admin-api-key", "a "), {})):
        assert "key" in refusal(*flags_, **given)


def test_other_flags_reach_the_engine() -> None:
    chosen = settings(
        "--dtype", "half", "--context-length", "512", "--max-total-tokens", "4096", "--chunked-prefill-size", "-1",
        "--disable-radix-cache", "--disable-overlap-schedule", "--disable-cuda-graph", "--threads", "2",
        "--max-host-lora-bytes", "8GiB", "--disable-lora-stack", "--max-queued-requests", "9", "--stream-interval", "4",
        "--sampling-defaults", "openai", "--log-level", "debug", "--mem-fraction-static", "0.5",
    )  # fmt: skip
    engine = chosen.engine
    assert (engine.dtype, engine.context_length, engine.max_total_tokens) == ("float16", 512, 4096)
    assert (engine.chunked_prefill_size, engine.disable_radix_cache, engine.disable_overlap_schedule) == (
        -1,
        True,
        True,
    )
    assert (engine.threads, engine.max_host_lora_bytes, engine.lora_stack) == (2, 8 * 2**30, False)
    assert (engine.max_queued_requests, engine.mem_fraction_static, engine.log_level) == (9, 0.5, "debug")
    assert (chosen.stream_interval, chosen.sampling_defaults, chosen.log_level) == (4, "openai", "debug")


def test_how_adapters_wait_and_leave() -> None:
    flags = ("--schedule-patience", "0", "--disable-lora-prefetch", "--lora-eviction-policy", "lru")
    engine = settings(*flags).engine
    assert (engine.schedule_patience, engine.lora_prefetch, engine.lora_eviction_policy) == (0, False, "lru")
    assert settings("--schedule-patience", "-1").engine.schedule_patience == -1
    assert settings("--num-continuous-decode-steps", "2").engine.num_continuous_decode_steps == 2
    assert [settings(*given).engine.compile_threads for given in ((), ("--compile-threads", "0"))] == [None, 0]


@pytest.mark.parametrize(
    "given",
    [
        ("--max-loras-per-batch", "0"),
        ("--schedule-patience", "-2"),
        ("--compile-threads", "-1"),
        ("--num-continuous-decode-steps", "-1"),
        ("--lora-eviction-policy", "fifo"),
        ("--port", "70000"),
        ("--mem-fraction-static", "1.5"),
        ("--chunked-prefill-size", "0"),
        ("--max-host-lora-bytes", "much"),
        ("--lora-backend", "csgmv"),
        ("--shutdown-timeout", "-1"),
        ("--lora-path", "a=b"),
        ("--bogus",),
    ],
)
def test_bad_values_end_with_one_line_that_names_the_flag(
    given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["serve", *given])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert given[0] in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(("text", "size"), [("5", 5), ("2k", 2048), ("3M", 3 * 2**20), ("1gb", 2**30), ("1TiB", 2**40)])
def test_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size


def test_every_flag_has_a_help_text() -> None:
    actions = build_parser()._subparsers._group_actions[0].choices["serve"]._actions  # type: ignore[union-attr, index]
    assert len(actions) > 30
    for action in actions:
        assert isinstance(action, argparse.Action)
        assert action.help, action.option_strings


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    text = capsys.readouterr().out
    assert "(default: 30000)" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("loramux")


def test_a_refusal_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--tp-size", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loramux: error: --tp-size 2")


def test_the_command_without_arguments_says_how() -> None:
    done = subprocess.run([sys.executable, "-m", "gateway.cli"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "COMMAND" in done.stderr

"""The flags about adapters as they act on a running server, and the errors of those that cannot start."""

from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.assemble import build
from engine.config import EngineConfig, LoraPath
from engine.link import memory_pair
from engine.models.dims import LORA_MODULES
from tests.e2e.conftest import ARENA_TOKENS, Files
from tests.e2e.server import Server, client_of, figures, generate, names_of, refusal, serving
from tests.support.adapters import write_adapter


async def test_more_adapters_than_may_be_loaded(files: Files, tmp_path: Path) -> None:
    """All are listed; the least recently used goes, and comes back from its source when it is named."""
    folders = [write_adapter(tmp_path / f"a{i}", files.model, rank=4 + i, seed=50 + i) for i in range(4)]
    paths = [f"a{i}={folder}" for i, folder in enumerate(folders)]
    limits = ("--max-loras-per-batch", "2", "--max-loaded-loras", "2", "--max-lora-rank", "16")
    flags = (*limits, "--lora-paths", *paths)
    with serving(tmp_path / "log", *files.flags, *flags) as server:
        async with client_of(server) as client:
            models = names_of((await client.get("/v1/models")).json()["data"])
            assert models == ["llama", *(f"llama:a{i}" for i in range(4))]
            assert await tiers(client) == {"a0": True, "a1": True, "a2": False, "a3": False}
            texts = [await generate(client, "hello", f"a{i}") for i in range(4)]
            assert len(set(texts)) == 4
            assert await tiers(client) == {"a0": False, "a1": False, "a2": True, "a3": True}
            assert await generate(client, "hello", "a0") == texts[0]
            assert await tiers(client) == {"a0": True, "a1": False, "a2": False, "a3": True}
            assert sum_of_host_evictions((await figures(client)).samples) >= 3
            everyone = await generate(client, ["hello"] * 4, [f"a{i}" for i in range(4)])
            assert everyone == texts
            await gone_from_its_source(client, folders)
            await changed_at_its_source(client, files, folders, texts)


def sum_of_host_evictions(samples: dict[Any, float]) -> float:
    return sum(
        value
        for (name, labels), value in samples.items()
        if name == "loramux_evictions_total" and dict(labels)["tier"] == "host"
    )


async def tiers(client: httpx.AsyncClient) -> dict[str, bool]:
    """Whether each adapter is on the host or in the arena."""
    told = await figures(client)
    loaded = [dict(labels) for name, labels in told.samples if name == "loramux_adapter_loaded"]
    return {labels["adapter"]: labels["tier"] != "none" for labels in loaded}


async def gone_from_its_source(client: httpx.AsyncClient, folders: list[Path]) -> None:
    """What cannot be loaded again is a 503 with the reason, remembered until it is asked for; the others go on."""
    away = next(name for name, here in (await tiers(client)).items() if not here)
    folder = folders[int(away[1:])]
    folder.rename(folder.with_name("hidden"))
    body = {"model": f"llama:{away}", "prompt": "hello", "max_tokens": 2}
    for stream in (False, True):
        response = await client.post("/v1/completions", json=body | {"stream": stream})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "adapter_unavailable"
        assert "no such folder" in response.json()["error"]["message"]
    assert await generate(client, "hello", None)
    folder.with_name("hidden").rename(folder)
    assert (await client.post("/v1/completions", json=body)).status_code == 503
    await forget_failure(client, away)
    assert (await client.post("/v1/completions", json=body)).status_code == 200


async def forget_failure(client: httpx.AsyncClient, name: str) -> None:
    """A pin reads the source again, whatever is remembered of it."""
    for action in ("pin", "unpin"):
        assert (await client.post(f"/{action}_lora_adapter", json={"lora_name": name})).status_code == 200


async def changed_at_its_source(client: httpx.AsyncClient, files: Files, folders: list[Path], texts: list[str]) -> None:
    """Other content under the same path is another adapter, of another rank too; never the old one's prefix blocks."""
    away = next(name for name, here in (await tiers(client)).items() if not here)
    number = int(away[1:])
    write_adapter(folders[number], files.model, rank=16, seed=99)
    changed = await generate(client, "hello", away)
    assert changed not in texts
    assert await generate(client, "hello", away) == changed
    others = [i for i in range(4) if i != number]
    assert [await generate(client, "hello", f"a{i}") for i in others] == [texts[i] for i in others]
    assert (await tiers(client))[away] is False
    await refused_when_it_is_broken(client, folders[number], away)
    write_adapter(folders[number], files.model, rank=16, seed=99)
    await forget_failure(client, away)
    assert await generate(client, "hello", away) == changed


async def refused_when_it_is_broken(client: httpx.AsyncClient, folder: Path, name: str) -> None:
    (folder / "adapter_config.json").write_text("{}")
    response = await client.post("/v1/completions", json={"model": f"llama:{name}", "prompt": "hello"})
    assert response.status_code == 503
    assert "peft_type" in response.json()["error"]["message"]


async def test_without_enable_lora_a_load_says_how(files: Files, tmp_path: Path) -> None:
    with serving(tmp_path / "log", *files.flags) as server:
        async with client_of(server) as client:
            for path in ("/load_lora_adapter", "/v1/load_lora_adapter"):
                body = {"lora_name": "lora0", "lora_path": str(files.rank4)}
                answer = await client.post(path, json=body)
                assert answer.status_code == 400
                assert answer.json()["error"]["code"] == "lora_disabled"
                assert "--enable-lora" in answer.json()["error_message"]
            assert names_of((await client.get("/v1/models")).json()["data"]) == ["llama"]
            assert (await client.get("/get_model_info")).json()["enable_lora"] is False
            unknown = await client.post("/unload_lora_adapter", json={"lora_name": "lora0"})
            assert unknown.status_code in (400, 404)


async def test_limits_are_inferred_or_given(files: Files, tmp_path: Path) -> None:
    """Limits of --lora-paths hold for later loads; a bare path is named by its last component."""
    with serving(tmp_path / "log", *files.flags, "--lora-paths", files.rank4, "--max-lora-rank", "8") as server:
        async with client_of(server) as client:
            assert names_of((await client.get("/v1/models")).json()["data"]) == ["llama", "llama:rank4"]
            facts = (await client.get("/get_model_info")).json()
            assert facts["max_lora_rank"] == 8
            assert facts["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
            assert "/" not in facts["model_path"]
            body: dict[str, Any] = {"lora_name": "big", "lora_path": str(files.rank64)}
            reason = (await client.post("/load_lora_adapter", json=body)).json()["error_message"]
            assert "--lora-target-modules" in reason or "--max-lora-rank" in reason


def test_a_wrong_combination_of_flags_says_so(files: Files, tmp_path: Path) -> None:
    cases: list[tuple[list[str], list[str]]] = [
        (
            ["--max-loaded-loras", "2", "--max-loras-per-batch", "4"],
            ["--max-loaded-loras 2", "--max-loras-per-batch 4"],
        ),
        (["--tp-size", "2"], ["--tp-size 2", "not supported"]),
        (["--lora-backend", "triton", "--device", "cpu"], ["--lora-backend triton", "needs a GPU", "torch"]),
        (["--lora-paths", "a=/nowhere/at/all"], ["--lora-paths", "/nowhere/at/all"]),
        (["--lora-paths", f"a={files.rank4}", f"a={files.rank64}"], ["--lora-paths", "'a'"]),
        (["--lora-paths", f"llama={files.rank4}"], ["--lora-paths", "base model's name"]),
        (["--lora-paths", f"a/../b={files.rank4}"], ["--lora-paths", "cannot name an adapter"]),
        (["--lora-paths", '{"lora_name": "a"}'], ["--lora-paths", "lora_path"]),
        (["--max-lora-rank", "0"], ["--max-lora-rank", "less than 1"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ]
    for flags, words in cases:
        line = refusal(tmp_path / "log", *files.flags, *flags)
        assert all(word in line for word in words), f"{flags}: {line}"


def test_what_the_engine_refuses_is_one_line(files: Files, tmp_path: Path) -> None:
    flags = ("--context-length", "1024", "--max-total-tokens", "512")
    line = refusal(tmp_path / "log", *files.flags, *flags)
    assert line.startswith("loramux: error: ")
    assert "a context of 1024 tokens does not fit" in line
    assert "--context-length 512" in line


def broken_adapter(files: Files, folder: Path) -> Path:
    write_adapter(folder, files.model, rank=4)
    (folder / "adapter_model.safetensors").unlink()
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a broken adapter": ({"lora_paths": "broken"}, r"--lora-paths broken=.*has no adapter_model\.safetensors"),
    "a broken one beyond the limits": (
        {"lora_paths": "broken", "max_lora_rank": 8, "lora_target_modules": LORA_MODULES},
        r"--lora-paths broken=.*has no adapter_model\.safetensors",
    ),
    "too large a rank": (
        {"lora_paths": "rank64", "max_lora_rank": 4},
        r"--lora-paths rank64=.*rank 64.*max-lora-rank",
    ),
    "no such adapter": ({"lora_paths": "nowhere"}, r"--lora-paths nowhere=.*no such folder"),
    "no such model": ({"model_path": "/nowhere/at/all"}, r"/nowhere/at/all.*no such folder"),
    "no model": ({"model_path": "rank4"}, r"rank4.*no config\.json"),
    "more context than the model has": ({"context_length": 10**6}, r"--context-length 1000000: the model has \d+ pos"),
    "triton without a GPU": ({"lora_backend": "triton", "device": "cpu"}, r"triton needs a GPU.*torch"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_an_engine_cannot_start_with(files: Files, tmp_path: Path, case: str) -> None:
    """In this process: the message that a server shows in its one line."""
    settings, reason = REFUSED[case]
    folders = {"rank64": files.rank64, "rank4": files.rank4, "broken": broken_adapter(files, tmp_path / "broken")}
    changes = dict(settings)
    if name := changes.pop("lora_paths", None):
        changes["lora_paths"] = (LoraPath(name=name, path=str(folders.get(name, tmp_path / name))),)
    changes["model_path"] = str(folders.get(changes.get("model_path", ""), changes.get("model_path", files.model)))
    config = EngineConfig(max_total_tokens=ARENA_TOKENS, max_host_lora_bytes=2**26, threads=1)
    with pytest.raises(Exception, match=reason):
        await build(msgspec.structs.replace(config, **changes), memory_pair()[1])


def test_an_address_that_is_taken(server: Server, files: Files, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    assert f"--port {port}" in refusal(tmp_path / "log", *files.flags, "--port", port)

"""What `loramux check-adapter` finds: the table, the needs, and the verdict of every stage."""

from pathlib import Path

import pytest

from engine.check_adapter import Report, check
from engine.config import EngineConfig, LoraPath
from engine.models.source import ModelSourceError
from tests.support.adapters import write_adapter
from tests.support.models import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def mixed(base: Path) -> Path:
    """Two modules, and one layer of one of them with a rank of its own."""
    ranks = {"layers.0.self_attn.q_proj": 8}
    return write_adapter(base.parent / "mixed", base, rank=20, modules=("q_proj", "down_proj"), rank_pattern=ranks)


def checked(base: Path, adapter: Path, **limits: object) -> Report:
    paths = (LoraPath(name="adapter", path=str(adapter)),)
    return check(EngineConfig(model_path=str(base), lora_paths=paths, **limits))  # type: ignore[arg-type]


def test_an_adapter_that_is_accepted_is_told_module_by_module(base: Path, mixed: Path) -> None:
    report = checked(base, mixed)
    assert report.refusal is None
    assert [row[:4] for row in report.modules] == [
        ("q_proj", "0", "8", "2"),
        ("q_proj", "1", "20", "0.8"),
        ("down_proj", "0-1", "20", "0.8"),
    ]
    facts = dict(report.facts)
    assert facts["needs"] == "--max-lora-rank 20 --lora-target-modules q_proj down_proj"
    assert "LlamaForCausalLM, 2 layers, float32" in facts["base"]
    assert report.text().splitlines()[-1].split() == ["verdict", "accepted"]


def test_the_servers_limits_are_kept_and_the_table_is_there_all_the_same(base: Path, mixed: Path) -> None:
    rank = checked(base, mixed, max_lora_rank=8)
    assert rank.refusal is not None
    assert "has rank 20; this server takes at most 8 (--max-lora-rank)" in rank.refusal
    assert len(rank.modules) == 3
    modules = checked(base, mixed, lora_target_modules=("q_proj",))
    assert modules.refusal is not None
    assert "down_proj" in modules.refusal


def test_what_is_not_supported_is_refused_with_its_reason(base: Path) -> None:
    report = checked(base, write_adapter(base.parent / "dora", base, use_dora=True))
    assert report.refusal is not None
    assert "DoRA is not supported" in report.refusal
    assert report.modules == []
    assert "refused: adapter_config.json: use_dora" in report.text()


def test_values_that_do_not_fit_the_dtype_are_refused(base: Path) -> None:
    large = write_adapter(base.parent / "large", base, std=1e6)
    assert checked(base, large).refusal is None
    half = checked(base, large, dtype="float16")
    assert half.refusal is not None
    assert "do not fit float16" in half.refusal


def test_an_adapter_that_is_not_there_is_refused_and_a_base_that_is_not_there_is_no_verdict(
    base: Path, mixed: Path
) -> None:
    missing = checked(base, base.parent / "nothing")
    assert missing.refusal is not None
    assert "there is no such folder" in missing.refusal
    with pytest.raises(ModelSourceError, match="no such folder"):
        checked(base.parent / "nothing", mixed)

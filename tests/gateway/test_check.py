"""`loramux check-adapter` as users call it: what it prints, its exit status, and that the gateway stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

from gateway import cli
from tests.support.adapters import write_adapter
from tests.support.models import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "tiny")


def run(base: Path, adapter: Path, *flags: str) -> int:
    return cli.main(["check-adapter", str(adapter), "--model-path", str(base), *flags])


def test_it_prints_the_table_and_the_verdict(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(base.parent / "sql", base, rank=8)
    assert run(base, adapter, "--lora-target-modules", "all", "--dtype", "half") == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "module     layers  rank  scale" in printed.out
    assert "down_proj" in printed.out
    assert "float16" in printed.out
    assert printed.out.endswith("accepted\n")
    assert run(base, adapter, "--max-lora-rank", "4") == 1
    assert "this server takes at most 4 (--max-lora-rank)" in capfd.readouterr().out


def test_a_base_that_is_not_there_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nothing", tmp_path) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("loramux: error: --model-path ")
    assert printed.err.count("\n") == 1


def test_a_module_that_does_not_exist_is_refused_before_anything_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-adapter", "x", "--lora-target-modules", "lm_head"]) == 1
    assert "lm_head unknown" in capfd.readouterr().err


def test_its_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom gateway import cli\n"
        "try: cli.main(['check-adapter', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--adapter-revision" in done.stdout
    assert done.stdout.endswith("False\n")

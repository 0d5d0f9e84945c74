"""Dependencies point one way: gateway -> engine's contracts; engine -> kernels; and who must not import torch does not.

Walks the source of every module; then runs the gateway in a process of its own and looks at what it has imported.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "triton", "transformers", "peft", "safetensors"}
GATEWAY_MAY = {"engine.types", "engine.config", "engine.messages", "engine.link", "engine.client"}
WITHOUT_TORCH = (
    "types", "config", "messages", "link", "client", "plan", "scheduler", "blocks", "arena", "sequence", "geometry",
    "memory", "planner", "queue", "roster", "slots", "stats", "adapters.adapter", "adapters.catalog",
    "adapters.residency",
)  # fmt: skip


def modules(package: str) -> list[str]:
    files = (ROOT / package).rglob("*.py")
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)


def path_of(module: str) -> Path:
    base = ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def imports(module: str, *, at_import_only: bool = False) -> Iterator[str]:
    """Every module that `module` names in an import; `at_import_only` leaves out those inside functions."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    for node in _nodes(tree) if at_import_only else ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(source), names=names):
                yield from (f"{source}.{a.name}" if path_of(f"{source}.{a.name}").exists() else source for a in names)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _nodes(node)


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", modules("gateway"))
def test_the_gateway_knows_only_the_engines_contracts(module: str) -> None:
    named = set(imports(module))
    assert {name for name in named if top(name) == "engine"} <= GATEWAY_MAY
    assert not {name for name in named if top(name) in HEAVY | {"kernels"}}


@pytest.mark.parametrize("module", modules("engine"))
def test_the_engine_knows_nothing_of_the_gateway(module: str) -> None:
    assert "gateway" not in set(map(top, imports(module)))


@pytest.mark.parametrize("module", modules("kernels"))
def test_kernels_know_neither(module: str) -> None:
    assert not {"gateway", "engine"} & set(map(top, imports(module)))


def reached(module: str) -> set[str]:
    """Everything of ours and of others that importing `module` imports, found in the sources."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if top(name) in {"gateway", "engine", "kernels"}:
            packages = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
            waiting += [*packages, *imports(name, at_import_only=True)]
    return seen


@pytest.mark.parametrize("module", [f"engine.{name}" for name in WITHOUT_TORCH])
def test_decisions_and_contracts_need_no_torch(module: str) -> None:
    assert not HEAVY & set(map(top, reached(module)))


@pytest.mark.parametrize("package", ["gateway", "engine", "kernels"])
def test_packages_are_empty_of_imports(package: str) -> None:
    assert list(imports(package)) == []


PROGRAM = """
import asyncio, importlib, pathlib, pkgutil, sys
import gateway
for found in pkgutil.walk_packages(gateway.__path__, "gateway."):
    importlib.import_module(found.name)
from tests.gateway.app_harness import make_app

async def main():
    async with make_app(pathlib.Path(sys.argv[1])).client() as client:
        body = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert (await client.get("/metrics")).status_code == 200

asyncio.run(main())
print(sorted({"torch", "transformers", "triton", "numpy", "kernels"} & set(sys.modules)))
"""


def test_the_whole_gateway_serves_a_chat_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

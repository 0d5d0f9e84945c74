"""Where a base model comes from: the demo, a local folder or the Hugging Face hub. Imports no torch."""

from pathlib import Path

# Weights in other forms (pickles among them) are never fetched.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
CONFIG_FILES = ["config.json", "generation_config.json"]


class ModelSourceError(Exception):
    """A base model that cannot be had; the message says why and what to do."""


def resolve_model(
    model_path: str | None, revision: str | None = None, *, progress: bool = True, weights: bool = True
) -> Path:
    """The local folder of `model_path`: the demo for None, else a folder, else a hub repository.

    Without `weights` nothing but the configuration of a hub repository is fetched.
    """
    if model_path is None:
        from engine.models.demo import ensure_demo_model

        return ensure_demo_model(progress=progress)
    folder = Path(model_path).expanduser()
    if folder.exists():
        return _checked_folder(folder)
    if _looks_local(model_path):
        raise ModelSourceError(f"--model-path {model_path}: there is no such folder")
    return _from_hub(model_path, revision, HUB_FILES if weights else CONFIG_FILES)


def _looks_local(model_path: str) -> bool:
    """A hub id is `name` or `owner/name`; anything that starts or nests like a path is meant as one."""
    return model_path.startswith(("/", "./", "../", "~")) or model_path.count("/") > 1


def _checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelSourceError(f"--model-path {folder}: not a folder (a Hugging Face checkpoint folder is wanted)")
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"--model-path {folder}: the folder has no config.json")
    return folder.resolve()


def _from_hub(repo: str, revision: str | None, files: list[str]) -> Path:
    """Fetch, or take from the hub's own cache, the files that serving needs."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return _checked_folder(Path(snapshot_download(repo, revision=revision, allow_patterns=files)))
    except HFValidationError as error:
        raise ModelSourceError(f"--model-path {repo!r}: neither a folder nor a hub repository id ({error})") from error
    except GatedRepoError as error:
        raise ModelSourceError(f"--model-path {repo}: gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"--model-path {repo}: no such folder, and no such repository on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelSourceError(f"--model-path {repo}: the repository has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelSourceError(
            f"--model-path {repo}: no such folder, and the hub could not be reached ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

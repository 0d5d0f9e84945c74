"""The two files of an adapter in a hub repository, as a folder of the hub's cache. Blocking; called in threads.

How large they are is asked before anything of them is fetched.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.adapters.spec import invalid
from engine.config import MAX_LORA_HUB_BYTES
from engine.types import ADAPTER_FILES, EngineError, ErrorCode

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo


class RepositoryMissing(EngineError):
    """The hub was asked and has no such repository, or shows it to others only, or there is no adapter in it."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.ADAPTER_INVALID, message)


def fetch_from_hub(repo: str, revision: str | None, max_bytes: int = MAX_LORA_HUB_BYTES) -> Path:
    """The local snapshot of a repository's two files, from the hub's cache where it is up to date.

    Raises EngineError (ADAPTER_INVALID) with the reason; RepositoryMissing where the hub says that there is none.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = repo if revision is None else f"{repo} at revision {revision}"
    try:
        return _fetch(repo, revision, asked, max_bytes)
    except EngineError:
        raise
    except GatedRepoError:
        raise invalid(f"{asked}: this hub repository is gated; accept its terms and set HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise RepositoryMissing(
            f"{asked}: neither a local folder nor a hub repository that can be seen from here"
        ) from None
    except RevisionNotFoundError:
        raise RepositoryMissing(f"{asked}: the hub repository has no such revision") from None
    except OSError as error:
        if error.filename is None:  # of the network
            raise _unreachable(asked, error) from None
        raise invalid(f"{asked}: it cannot be written to the hub's cache ({error.strerror})") from None
    except Exception as error:  # the hub's client lets its HTTP library's errors through
        raise _unreachable(asked, error) from None


def _fetch(repo: str, revision: str | None, asked: str, max_bytes: int) -> Path:
    """What is fetched is the commit whose sizes were told; where none are told it is in the cache or not to be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    wanted = list(ADAPTER_FILES)
    try:
        files = snapshot_download(repo, revision=revision, allow_patterns=wanted, dry_run=True)
    except DryRunError as error:
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            raise error.__cause__ or error from None
    _refuse(files, asked, max_bytes)
    return Path(snapshot_download(repo, revision=files[0].commit_hash, allow_patterns=wanted))


def _refuse(files: "Sequence[DryRunFileInfo]", asked: str, max_bytes: int) -> None:
    missing = sorted(set(ADAPTER_FILES) - {file.filename for file in files})
    if len(missing) == len(ADAPTER_FILES):
        raise RepositoryMissing(f"{asked}: there is no adapter in this hub repository ({' and '.join(missing)})")
    if missing:
        raise invalid(f"{asked}: the hub repository has no {missing[0]} (adapters in PEFT's format are wanted)")
    if unknown := [file.filename for file in files if file.file_size is None]:
        raise invalid(f"{asked}: the hub does not tell how large {unknown[0]} is")
    size = sum(file.file_size or 0 for file in files)
    if size > max_bytes:
        limit = f"at most {max_bytes:,} are fetched (--max-lora-hub-bytes)"
        raise invalid(f"{asked}: its files have {size:,} bytes; {limit}")


def _unreachable(asked: str, error: Exception) -> EngineError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return invalid(f"{asked}: there is no such local folder, and the hub cannot be reached ({reason})")

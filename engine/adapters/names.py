"""What an adapter may be called. The catalogue checks every name here before anything else sees it."""

import re

from engine.types import EngineError, ErrorCode

MAX_NAME = 128
_NAME = re.compile(rf"[A-Za-z0-9._/-]{{1,{MAX_NAME}}}")


def check_adapter_name(name: str, base: str) -> None:
    """Raises EngineError (ADAPTER_INVALID) unless an adapter may bear the name beside the base called `base`."""
    if reason := _fault(name, base):
        raise EngineError(ErrorCode.ADAPTER_INVALID, f"adapter name {name[: MAX_NAME + 1]!r}: {reason}")


def _fault(name: str, base: str) -> str | None:
    if not name:
        return "a name is needed"
    if len(name) > MAX_NAME:
        return f"longer than {MAX_NAME} characters"
    if not _NAME.fullmatch(name):
        return "only letters, digits and the characters . _ / - are allowed"
    if ".." in name:
        return "'..' is not allowed"
    if name.startswith("/"):
        return "a leading slash is not allowed"
    if name == base:
        return "this is the base model's name"
    return None

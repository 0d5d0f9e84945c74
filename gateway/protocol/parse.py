"""A request's body to its typed struct, with every refusal a 400 that names the field.

Also holds the rule for fields that are known and not supported: they are accepted at values that change nothing.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from gateway.errors import QUOTE_LIMIT, ApiError, bad_request, quote, shorten

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`", re.DOTALL)
_PATH = re.compile(r"(?P<reason>.*) - at `(?P<path>.*)`", re.DOTALL)


class Problem(NamedTuple):
    """What is wrong with a body, and where."""

    reason: str
    param: str | None


def parse(body: bytes, kind: type[T]) -> T:
    """Decodes and validates a JSON body.

    Raises:
        ApiError: 400, with the field in `param` and in the message.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None


def convert(fields: Mapping[str, str], kind: type[T]) -> T:
    """A form's fields, which are text, as what they mean.

    Raises:
        ApiError: 400, with the field in `param` and in the message.
    """
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def not_supported(param: str, value: object = None) -> ApiError:
    """A 400 for a field that is known and that this server does not honour."""
    what = f"{quote(value)} for {param!r}" if isinstance(value, str) else f"{param!r}"
    return bad_request(f"{what} is not supported by this server.", param=param, code="unsupported_parameter")


def require_neutral(request: msgspec.Struct, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses every field of `neutral` whose value is neither null nor one that changes nothing."""
    for name, allowed in neutral.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            raise not_supported(name, value)


def _invalid(message: str) -> ApiError:
    problem = _locate(message)
    where = f"{problem.param!r}: " if problem.param else ""
    return bad_request(f"{where}{problem.reason}.", param=problem.param)


def _locate(message: str) -> Problem:
    """Splits msgspec's message into reason and path; a field that is unknown or missing is part of the path."""
    match = _PATH.fullmatch(message)
    reason, path = (match["reason"], match["path"]) if match else (message, "$")
    if found := _UNKNOWN.fullmatch(reason):
        return Problem("unknown field", _join(path, found["field"]))
    if found := _MISSING.fullmatch(reason):
        return Problem("required field is missing", _join(path, found["field"]))
    return Problem(shorten(reason.replace("`", "")), _join(path, "") or None)


def _join(path: str, field: str) -> str:
    parts = (path.removeprefix("$").removeprefix("."), shorten(field, QUOTE_LIMIT))
    return ".".join(part for part in parts if part)

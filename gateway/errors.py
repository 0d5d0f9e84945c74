"""What a client is told when something is refused or fails, in OpenAI's error shape.

Everything in the gateway raises `ApiError`; the one table here maps the engine's error codes. Never holds a traceback.
"""

from collections.abc import Mapping
from typing import NamedTuple

import orjson
from starlette.responses import Response

from engine.types import EngineError, ErrorCode

QUOTE_LIMIT = 64  # characters of a client's own text that an answer repeats
INVALID_REQUEST = "invalid_request_error"

STATUS_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}  # every other 4xx is an invalid_request_error


class Mapped(NamedTuple):
    """One row of the table from engine to client."""

    status: int
    type: str
    code: str | None
    param: str | None = None


ENGINE_ERRORS: Mapping[ErrorCode, Mapped] = {
    ErrorCode.INVALID_REQUEST: Mapped(400, INVALID_REQUEST, None),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: Mapped(400, INVALID_REQUEST, "context_length_exceeded"),
    ErrorCode.ADAPTER_NOT_FOUND: Mapped(404, INVALID_REQUEST, "model_not_found", "model"),
    ErrorCode.ADAPTER_EXISTS: Mapped(400, INVALID_REQUEST, "adapter_exists"),
    ErrorCode.ADAPTER_INVALID: Mapped(400, INVALID_REQUEST, "adapter_invalid"),
    ErrorCode.ADAPTER_UNAVAILABLE: Mapped(503, STATUS_TYPES[503], "adapter_unavailable"),
    ErrorCode.LORA_DISABLED: Mapped(400, INVALID_REQUEST, "lora_disabled"),
    ErrorCode.QUEUE_FULL: Mapped(503, STATUS_TYPES[503], "queue_full"),
    ErrorCode.ENGINE_DEAD: Mapped(503, STATUS_TYPES[503], "engine_dead"),
    ErrorCode.INTERNAL: Mapped(500, STATUS_TYPES[500], "internal_error"),
}


class ApiError(Exception):
    """An answer that is an error: its HTTP status and the four fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or type_of_status(status)
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


def type_of_status(status: int) -> str:
    """The error type that goes with a status where nothing says more."""
    fallback = STATUS_TYPES[500] if status >= 500 else INVALID_REQUEST
    return STATUS_TYPES.get(status, fallback)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 about one field of the request, or about the whole of it."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    """A 404 for a model name that is neither the base nor an adapter."""
    message = f"The model {quote(name)} does not exist; GET /v1/models lists what is served."
    return ApiError(404, message, param="model", code="model_not_found")


def from_engine(error: EngineError) -> ApiError:
    """The client's view of an engine's refusal or failure."""
    row = ENGINE_ERRORS[error.code]
    headers = {"retry-after": "1"} if row.status == 503 else None
    return ApiError(row.status, error.message, type=row.type, code=row.code, param=row.param, headers=headers)


def internal_error() -> ApiError:
    """A 500 that tells nothing of the inside; the log has the rest."""
    return ApiError(500, "The server had an internal error.", code="internal_error")


def to_api_error(error: Exception) -> ApiError:
    """Any exception as the answer it becomes."""
    match error:
        case ApiError():
            return error
        case EngineError():
            return from_engine(error)
        case _:
            return internal_error()


def error_response(error: ApiError) -> Response:
    """The whole HTTP answer for an error."""
    content = orjson.dumps(error.body())
    return Response(content, error.status, headers=error.headers, media_type="application/json")


def quote(text: str, limit: int = QUOTE_LIMIT) -> str:
    """A client's own text, quoted for a message: control characters escaped, long text cut with its length."""
    if len(text) <= limit:
        return repr(text)
    return f"{text[:limit]!r}... ({len(text)} characters)"


def shorten(text: str, limit: int = 400) -> str:
    """A reason that may hold a client's own text, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."

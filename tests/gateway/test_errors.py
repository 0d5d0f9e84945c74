"""The table from the engine's codes, and what an error looks like."""

import orjson
import pytest

from engine.types import EngineError, ErrorCode
from gateway.errors import ENGINE_ERRORS, ApiError, error_response, from_engine, model_not_found, quote, to_api_error


def test_every_engine_code_has_a_row() -> None:
    assert set(ENGINE_ERRORS) == set(ErrorCode)


@pytest.mark.parametrize(
    ("code", "status", "kind", "shown"),
    [
        (ErrorCode.INVALID_REQUEST, 400, "invalid_request_error", None),
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 400, "invalid_request_error", "context_length_exceeded"),
        (ErrorCode.ADAPTER_NOT_FOUND, 404, "invalid_request_error", "model_not_found"),
        (ErrorCode.ADAPTER_UNAVAILABLE, 503, "service_unavailable_error", "adapter_unavailable"),
        (ErrorCode.QUEUE_FULL, 503, "service_unavailable_error", "queue_full"),
        (ErrorCode.INTERNAL, 500, "server_error", "internal_error"),
    ],
)
def test_engine_errors(code: ErrorCode, status: int, kind: str, shown: str | None) -> None:
    error = from_engine(EngineError(code, "the reason"))
    assert (error.status, error.type, error.code, error.message) == (status, kind, shown, "the reason")
    assert ("retry-after" in error.headers) == (status == 503)


def test_a_response_has_the_four_fields() -> None:
    response = error_response(ApiError(400, "why", param="n", code="c", headers={"allow": "GET"}))
    assert response.status_code == 400
    assert response.headers["allow"] == "GET"
    assert orjson.loads(bytes(response.body)) == {
        "error": {"message": "why", "type": "invalid_request_error", "param": "n", "code": "c"}
    }


def test_an_unexpected_failure_tells_nothing_of_the_inside() -> None:
    error = to_api_error(ValueError("secret"))
    assert (error.status, error.type) == (500, "server_error")
    assert "secret" not in error.message


def test_long_and_odd_names_are_not_repeated_whole() -> None:
    message = model_not_found("x" * 10_000).message
    assert len(message) < 250
    assert "(10000 characters)" in message
    assert quote("a\n\ud800") == r"'a\n\ud800'"

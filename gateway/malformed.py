"""Answers what is no HTTP, or has no end, as every other error is answered; uvicorn itself would send plain text."""

from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import ApiError, bad_request
from gateway.middleware import REQUEST_ID, choose_id

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers; what was read with them comes on top


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's, but for the answer to a request that cannot be read, or whose head is too large to be kept."""

    _in_head = False
    _head = 0  # bytes that came since the head began

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head = self._head + len(data) if self._in_head else 0
        if self._head > MAX_HEAD and not self.transport.is_closing():
            reason = f"The request line and the headers are larger than {MAX_HEAD} bytes."
            self._refuse(ApiError(431, reason, code="head_too_large"))

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(bad_request(msg))

    def _refuse(self, error: ApiError) -> None:
        self.transport.write(refusal(error))
        self.transport.close()


def refusal(error: ApiError) -> bytes:
    """The whole answer, head and body; the connection ends with it."""
    body = orjson.dumps(error.body())
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"{REQUEST_ID}: {choose_id(None)}",
        "connection: close",
        "\r\n",
    )
    return "\r\n".join(head).encode() + body

"""Answers what is no HTTP as every other error is answered; uvicorn itself would send plain text without an id."""

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import bad_request
from gateway.middleware import REQUEST_ID, choose_id


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's, but for the answer to a request that cannot be read."""

    def send_400_response(self, msg: str) -> None:
        self.transport.write(malformed_answer(msg))
        self.transport.close()


def malformed_answer(reason: str) -> bytes:
    """The whole answer, head and body; the connection ends with it."""
    body = orjson.dumps(bad_request(reason).body())
    head = (
        "HTTP/1.1 400 Bad Request",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"{REQUEST_ID}: {choose_id(None)}",
        "connection: close",
        "\r\n",
    )
    return "\r\n".join(head).encode() + body

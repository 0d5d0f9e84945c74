"""Server-sent events over one answer: encoding, errors before and after the first byte, and a client that goes away."""

import contextlib
import logging
from collections.abc import AsyncGenerator

import msgspec
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.disconnect import ClientGone, unless_gone
from gateway.errors import ApiError, error_response, to_api_error

DONE = b"data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)

log = logging.getLogger(__name__)


def event(data: msgspec.Struct) -> bytes:
    """One event."""
    return b"data: %b\n\n" % msgspec.json.encode(data)


def error_event(error: ApiError) -> bytes:
    """The event that tells of a failure after the first byte."""
    return b"data: %b\n\n" % orjson.dumps(error.body())


class EventStream(Response):
    """Sends encoded events as they come, `[DONE]` behind them.

    The answer starts with the first event, so that an error before it still has its own status. The generator is closed
    when the stream ends, fails or is abandoned.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = list(HEADERS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            try:
                first = await anext(events, b"")
            except Exception as error:
                await error_response(_known(error))(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, first)
            await self._send_rest(events, send)

    async def _send_rest(self, events: AsyncGenerator[bytes, None], send: Send) -> None:
        try:
            async for data in events:
                await self._send(send, data)
        except Exception as error:
            await self._send(send, error_event(_known(error)))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _known(error: Exception) -> ApiError:
    known = to_api_error(error)
    if known.code == "internal_error":
        log.error("a stream failed", exc_info=error)
    return known

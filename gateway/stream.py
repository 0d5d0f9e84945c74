"""Server-sent events over one answer: encoding, errors before and after the first byte, and a client that goes away."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import msgspec
import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message, Receive, Scope, Send

from gateway.disconnect import ClientGone, unless_gone
from gateway.errors import ApiError, error_response, to_api_error

PING_SECONDS = 15.0
LINE_END = "\n"
# JSON may hold these as they are, and some clients (httpx's iter_lines) take them for the end of a line.
LINE_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
HEADERS = {"cache-control": "no-cache"}  # the response itself adds those against buffering

log = logging.getLogger(__name__)


def event(data: msgspec.Struct) -> bytes:
    """One event."""
    return _encode(msgspec.json.encode(data))


def error_event(error: ApiError) -> bytes:
    """The event that tells of a failure after the first byte."""
    return _encode(orjson.dumps(error.body()))


class EventStream(EventSourceResponse):
    """Sends encoded events as they come, `[DONE]` behind them, and comments that keep a silent connection open.

    The answer starts with the first event, so that an error before it still has its own status; where none comes for
    so long that a proxy might give up, it starts without. The generator is closed when the stream ends, fails or is
    abandoned.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], *, ping: float = PING_SECONDS) -> None:
        super().__init__(self._body(), headers=HEADERS, ping=ping, ping_message_factory=_ping, sep=LINE_END)
        self._events = events
        self._first: asyncio.Task[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._first = asyncio.create_task(_next(self._events))
        try:
            await unless_gone(receive, self._begin())
        except ClientGone:
            return
        except Exception as error:
            await error_response(_known(error))(scope, receive, send)
            return
        else:
            await super().__call__(scope, receive, send)
        finally:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
            await self._events.aclose()

    async def _begin(self) -> None:
        """Until the first event is there. Raises what failed before it."""
        assert self._first is not None
        done, _ = await asyncio.wait({self._first}, timeout=self.ping_interval)
        for task in done:
            task.result()

    async def _body(self) -> AsyncGenerator[bytes, None]:
        assert self._first is not None
        try:
            if first := await self._first:
                yield first
            async for data in self._events:
                yield data
        except Exception as error:
            yield error_event(_known(error))
        yield _encode(b"[DONE]")

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Ours have none: the library's would open a cancel scope for each event."""
        await send(message)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    """The next event; empty where there is none."""
    return await anext(events, b"")


def _encode(data: bytes) -> bytes:
    """One line of JSON as an event. The separators can only be within its strings, where an escape means the same."""
    if not data.isascii():
        data = data.decode().translate(LINE_SEPARATORS).encode()
    return b"data: %b\n\n" % data


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep=LINE_END)


def _known(error: Exception) -> ApiError:
    known = to_api_error(error)
    if known.code == "internal_error":
        log.error("a stream failed", exc_info=error)
    return known

"""What surrounds every request: an id, a log line, HTTP metrics, the limit of the body, and the last net for errors.

Plain ASGI. Log lines hold neither headers nor query strings nor bodies.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ApiError, error_response, internal_error
from gateway.metrics import Metrics

REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
UNMATCHED = "unmatched"
DRAIN_BYTES = 64 * 2**20  # of a body that is too large, read and dropped so that the client gets to read the answer
QUIET = frozenset({"/health", "/metrics", "/status", "/v1/lora_adapters"})  # probes and the page ask all the time

access = logging.getLogger("gateway.access")
log = logging.getLogger(__name__)


class Observe:
    """Outermost: gives each request its id, and tells log and metrics how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, templates: Mapping[Any, str]) -> None:
        """`templates`: each endpoint's path as the route spells it, so that labels stay few."""
        self._app = app
        self._metrics = metrics
        self._templates = templates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = choose_id(Headers(scope=scope).get(REQUEST_ID))
        answer = Answer(send, request_id)
        start = time.perf_counter()
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            log.exception("request %s failed", request_id)
            if answer.status is None:
                await error_response(internal_error())(scope, receive, answer.send)
        finally:
            self._tell(scope, answer, time.perf_counter() - start)

    def _tell(self, scope: Scope, answer: "Answer", seconds: float) -> None:
        route = self._templates.get(scope.get("endpoint"), UNMATCHED)
        status = answer.status or 499  # nothing was sent: the client went first
        self._metrics.http_request(route, scope["method"], status, seconds)
        level = logging.DEBUG if route in QUIET and status == 200 else logging.INFO
        if access.isEnabledFor(level):
            peer = (scope.get("client") or ("-",))[0]
            # %r: a path may hold line breaks, which must not forge log lines
            line = "%s %s %.200r %d %.0f ms %s"
            access.log(level, line, peer, scope["method"], scope["path"], status, seconds * 1000, answer.request_id)


class Answer:
    """A `send` that adds the request's id and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self.request_id
        await self._send(message)


def choose_id(given: str | None) -> str:
    """The client's own id where it is sane, else a fresh one."""
    if given is not None and SANE_ID.fullmatch(given):
        return given
    return f"req-{secrets.token_hex(16)}"


class LimitBody:
    """Refuses bodies over a size, announced or not, with 413. The error is raised to whoever reads the body."""

    def __init__(self, app: ASGIApp, limit: int, others: Mapping[str, int]) -> None:
        """`others`: paths with a limit of their own."""
        self._app = app
        self._limit = limit
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._others.get(scope["path"], self._limit)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            await _drain(receive)
            raise _too_large(limit)
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                if message.get("more_body", False):
                    await _drain(receive)
                raise _too_large(limit)
            return message

        await self._app(scope, limited, send)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")


async def _drain(receive: Receive) -> None:
    """Drops the rest of a body, up to a bound: who still sends then finds the connection closed."""
    dropped = 0
    while dropped < DRAIN_BYTES:
        message = await receive()
        dropped += len(message.get("body", b""))
        if not message.get("more_body", False):
            return

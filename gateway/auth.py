"""Who may call what. Guards wrap single routes, so that no spelling of a path gets round them.

Two keys: the API key for all that serves, the admin key for what changes the server. Without an admin key the latter
answers clients on this machine alone, judged by the socket's peer, and nothing that a web page could send. With one it
is the key that counts, and of web pages only the server's own may send it.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import ApiError
from gateway.settings import Settings

Check = Callable[[Scope], None]
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")  # a proxy on this machine speaks for others


class Guard:
    """Runs a check before a route, which sees neither a body nor a header of what is refused."""

    def __init__(self, app: ASGIApp, check: Check) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check(scope)
        await self._app(scope, receive, send)


def guarded(routes: Sequence[BaseRoute], check: Check) -> list[BaseRoute]:
    """The same routes behind a check."""
    return [_guarded(route, check) for route in routes]


def _guarded(route: BaseRoute, check: Check) -> Route:
    assert isinstance(route, Route)
    return Route(route.path, route.endpoint, methods=route.methods, middleware=[Middleware(Guard, check)])


def api_check(settings: Settings) -> Check:
    """For routes that serve: the API key or the admin key, where an API key is set."""
    keys = [key for key in (settings.api_key, settings.admin_api_key) if key is not None]
    if settings.api_key is None:
        return _allow
    return lambda scope: _require_key(scope, keys)


def admin_check(settings: Settings, content_type: str = "application/json") -> Check:
    """For routes that change the server. `content_type` is what they take."""
    if settings.admin_api_key is not None:
        admin_key = settings.admin_api_key

        def keyed(scope: Scope) -> None:
            _require_key(scope, [admin_key])
            _refuse_other_sites(scope)

        return keyed
    serving = api_check(settings)

    def check(scope: Scope) -> None:
        serving(scope)
        _require_local(scope, content_type)

    return check


def _allow(scope: Scope) -> None:
    """Everyone may."""


def _require_key(scope: Scope, keys: Sequence[str]) -> None:
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    matches = [_same(given.strip(), key) for key in keys]  # all are compared, whichever matches
    if scheme.lower() != "bearer" or not any(matches):
        message = "This needs a key: send the header 'Authorization: Bearer KEY' with a valid one."
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _same(given: str, key: str) -> bool:
    """Takes as long whatever differs, length included."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (_as_sent(given), key)]
    return hmac.compare_digest(*digests)


def _as_sent(header: str) -> str:
    """Header values arrive as latin-1; a key may be UTF-8."""
    return header.encode("latin-1").decode("utf-8", "surrogateescape")


def _require_local(scope: Scope, content_type: str) -> None:
    """A page can have a browser post forms without asking first; they come with Origin or Sec-Fetch-Site, or both."""
    headers = Headers(scope=scope)
    if not is_loopback(scope.get("client")) or any(name in headers for name in FORWARDED):
        message = "Without --admin-api-key this route answers only clients on the server's own machine, past no proxy."
        raise ApiError(403, message, code="admin_key_required")
    if "origin" in headers or "sec-fetch-site" in headers:
        told = "the headers 'Origin', 'Sec-Fetch-Site'"
        message = f"Without --admin-api-key this route refuses what a web page sends ({told})."
        raise ApiError(403, message, code="origin_refused")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != content_type:
        raise ApiError(415, f"This route takes 'Content-Type: {content_type}' alone.", code="unsupported_media_type")


def _refuse_other_sites(scope: Scope) -> None:
    """What browsers send for pages of other sites: they say so, older ones by an Origin that is not the Host.

    A name that was made to point at this server (DNS rebinding) passes here; the key is what such a page lacks.
    """
    headers = Headers(scope=scope)
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None:
        is_own = origin is None or origin.partition("://")[2] == headers.get("host", "") != ""
    else:
        is_own = site in ("same-origin", "none")
    if not is_own:
        message = "This route takes nothing from web pages of other sites (the headers 'Sec-Fetch-Site', 'Origin')."
        raise ApiError(403, message, code="origin_refused")


def is_loopback(client: Sequence[object] | None) -> bool:
    """Whether the socket's peer is this machine. `client` is ASGI's (host, port)."""
    try:
        address = ipaddress.ip_address(str(client[0]) if client else "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback

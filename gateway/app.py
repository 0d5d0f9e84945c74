"""Puts the application together: routes behind their guards, middleware around them, every error in OpenAI's shape."""

import re

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.types import EngineError
from gateway.auth import admin_check, api_check, guarded
from gateway.errors import ApiError, error_response, quote, to_api_error
from gateway.metrics import Metrics
from gateway.middleware import LimitBody, Observe
from gateway.multipart import FORM_DATA
from gateway.routes import adapters, admin, health, native, openai, page, status, uploads
from gateway.settings import Settings
from gateway.state import Gateway


def create_app(gateway: Gateway, settings: Settings, metrics: Metrics) -> Starlette:
    """The application. `app.state.gateway` is replaced when another engine takes over; the rest stays."""
    routes = all_routes(settings)
    templates = {route.endpoint: route.path_format for route in routes if isinstance(route, Route)}
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Observe, metrics, templates),
            Middleware(Errors),
            Middleware(LimitBody, settings.max_body_bytes, {uploads.PATH: settings.max_lora_upload_bytes}),
        ],
        exception_handlers={
            ApiError: _answer_error,
            EngineError: _answer_error,
            HTTPException: _answer_http_exception,
        },
    )
    app.router.redirect_slashes = False  # a path with a slash too many is unknown
    app.state.gateway = gateway
    app.state.metrics = metrics
    return app


def all_routes(settings: Settings) -> list[BaseRoute]:
    """Every route behind its guard."""
    serving = [
        *openai.routes(),
        *adapters.routes(),
        *native.routes(),
        *health.info_routes(),
        *status.routes(settings),
    ]
    routes = [
        *guarded(serving, api_check(settings)),
        *guarded(admin.routes(), admin_check(settings)),
        *guarded(uploads.routes(), admin_check(settings, FORM_DATA)),
        *health.open_routes(),
        *page.routes(),
    ]
    for route in routes:
        _match_exactly(route)
    return routes


def _match_exactly(route: BaseRoute) -> None:
    """Starlette's patterns end in `$`, which also matches before a line break at the end of a path."""
    assert isinstance(route, Route)
    route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")


class Errors:
    """Answers what middleware refuses before Starlette's own handlers come into play."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(to_api_error(error))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    where = quote(request.scope["path"])
    match error.status_code:
        case 404:
            answer = ApiError(404, f"There is no route {where}.", code="unknown_route")
        case 405:
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            message = f"{request.method} is not allowed at {where}, but {allowed}."
            answer = ApiError(405, message, code="method_not_allowed", headers={"allow": allowed})
        case status:
            answer = ApiError(status, str(error.detail))
    return error_response(answer)

"""OpenAI's routes: completions, chats and models."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.call import Call
from gateway.chat import chat_call
from gateway.completions import completion_call
from gateway.disconnect import read_body, unless_gone
from gateway.errors import model_not_found
from gateway.protocol.chat import ChatRequest
from gateway.protocol.completions import CompletionRequest
from gateway.protocol.fields import SamplingFields
from gateway.protocol.parse import parse
from gateway.state import Gateway
from gateway.stream import EventStream

MODELS = "/v1/models/"
R = TypeVar("R", bound=SamplingFields)


def routes() -> list[BaseRoute]:
    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    ]


async def completions(request: Request) -> Response:
    return await _generate(request, CompletionRequest, completion_call)


async def chat_completions(request: Request) -> Response:
    return await _generate(request, ChatRequest, chat_call)


async def list_models(request: Request) -> Response:
    return _json(gateway_of(request).registry.cards())


async def get_model(request: Request) -> Response:
    """Reads the name from the path itself: the route's own match drops a newline at the end."""
    path: str = request.scope["path"]
    name = path.removeprefix(request.scope.get("root_path", "")).removeprefix(MODELS)
    if not name:
        raise model_not_found(name)  # where a body would be told that the field is required
    return _json(gateway_of(request).registry.card(name))


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _generate(request: Request, kind: type[R], make: Callable[[Gateway, R], Awaitable[Call]]) -> Response:
    body = parse(await read_body(request), kind)
    call = await make(gateway_of(request), body)
    if body.stream:
        return EventStream(call.events())
    return _json(await unless_gone(request.receive, call.answer()))


def _json(data: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")

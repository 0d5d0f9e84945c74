"""SGLang's own route, POST /generate."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.disconnect import read_body, unless_gone
from gateway.native import native_call
from gateway.protocol.native import GenerateRequest
from gateway.protocol.parse import parse
from gateway.routes.openai import gateway_of
from gateway.stream import EventStream


def routes() -> list[BaseRoute]:
    return [Route("/generate", generate, methods=["POST"])]


async def generate(request: Request) -> Response:
    body = parse(await read_body(request), GenerateRequest)
    call = await native_call(gateway_of(request), body)
    if body.stream:
        return EventStream(call.events())
    answer = await unless_gone(request.receive, call.answer())
    return Response(msgspec.json.encode(answer), media_type="application/json")

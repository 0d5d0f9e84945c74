"""GET /status: the arena by use, slots and the base's traffic, for whoever may call /v1/models. The page reads it."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.routes.adapters import fresh_stats
from gateway.routes.openai import gateway_of
from gateway.settings import Settings
from gateway.status import server_status


def routes(settings: Settings) -> list[BaseRoute]:
    has_admin_key = settings.admin_api_key is not None

    async def status(request: Request) -> Response:
        client = gateway_of(request).client
        stats = await fresh_stats(client)
        answer = server_status(client.model, stats, alive=client.alive, admin_key=has_admin_key)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return [Route("/status", status, methods=["GET"])]

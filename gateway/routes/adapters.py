"""GET /v1/lora_adapters: every adapter with its state, its tier and its traffic, for whoever may call /v1/models."""

import asyncio
import contextlib

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from engine.messages import Stats
from engine.types import EngineError
from gateway.adapters import adapter_list
from gateway.routes.openai import gateway_of
from gateway.state import Engine

STATS_SECONDS = 1.0  # how long an answer waits for fresh figures; then it tells what is known without them


def routes() -> list[BaseRoute]:
    return [Route("/v1/lora_adapters", list_adapters, methods=["GET"])]


async def list_adapters(request: Request) -> Response:
    gateway = gateway_of(request)
    stats = await fresh_stats(gateway.client)
    answer = adapter_list(gateway.registry.base, gateway.client.adapters.values(), stats)
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def fresh_stats(client: Engine) -> Stats:
    """The engine's figures; empty where it does not tell them in time."""
    with contextlib.suppress(EngineError, TimeoutError):
        async with asyncio.timeout(STATS_SECONDS):
            return await client.stats()
    return Stats()

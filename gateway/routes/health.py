"""Whether the server serves, what it serves, and its metrics."""

import asyncio
import contextlib

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from engine.types import EngineError, ErrorCode
from gateway.errors import error_response, from_engine
from gateway.metrics import Metrics
from gateway.routes.openai import gateway_of

STATS_SECONDS = 1.0  # how long a scrape waits for fresh figures; then it shows the last heartbeat's


class Health(msgspec.Struct, frozen=True, kw_only=True):
    status: str = "ok"


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /get_model_info, with SGLang's names; no paths of the server."""

    model_path: str  # the served name: the hub id, or a folder's last component, unless --served-model-name says else
    tokenizer_path: str
    is_generation: bool = True
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    enable_lora: bool
    max_loras_per_batch: int
    max_lora_rank: int
    lora_target_modules: tuple[str, ...]
    lora_backend: str


def open_routes() -> list[BaseRoute]:
    """For probes and scrapers, which hold no key."""
    return [Route("/health", health, methods=["GET"]), Route("/metrics", metrics, methods=["GET"])]


def info_routes() -> list[BaseRoute]:
    return [Route("/get_model_info", get_model_info, methods=["GET"])]


async def health(request: Request) -> Response:
    """200 while the engine lives; 503 while it is being started again."""
    if gateway_of(request).client.alive:
        return Response(msgspec.json.encode(Health()), media_type="application/json")
    reason = "the engine was lost and is being started again"
    return error_response(from_engine(EngineError(ErrorCode.ENGINE_DEAD, reason)))


async def get_model_info(request: Request) -> Response:
    model = gateway_of(request).client.model
    facts = ModelFacts(
        model_path=model.served_name,
        tokenizer_path=model.served_name,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        device=model.device,
        enable_lora=model.enable_lora,
        max_loras_per_batch=model.max_loras_per_batch,
        max_lora_rank=model.max_lora_rank,
        lora_target_modules=model.lora_target_modules,
        lora_backend=model.lora_backend,
    )
    return Response(msgspec.json.encode(facts), media_type="application/json")


async def metrics(request: Request) -> Response:
    """Asks the engine for fresh figures, which reach `Metrics` through the client."""
    with contextlib.suppress(EngineError, TimeoutError):
        async with asyncio.timeout(STATS_SECONDS):
            await gateway_of(request).client.stats()
    owner: Metrics = request.app.state.metrics
    content, media_type = await asyncio.to_thread(owner.render, request.headers.get("accept", ""))
    return Response(content, headers={"content-type": media_type})

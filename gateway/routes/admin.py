"""Loading, unloading and pinning adapters: SGLang's routes, and vLLM's with the same effects and statuses."""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from engine.types import AdapterState, EngineError
from gateway.disconnect import read_body
from gateway.errors import ApiError, bad_request, from_engine
from gateway.lora_paths import Weight, name_problem
from gateway.models import is_served
from gateway.protocol.parse import not_supported, parse
from gateway.routes.openai import gateway_of
from gateway.state import Gateway

T = TypeVar("T", bound=msgspec.Struct)
Name = Annotated[str, msgspec.Meta(min_length=1)]


class LoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    lora_path: Name  # folder on the server, or hub id
    pinned: bool | None = None
    weight: Weight | None = None  # of its share under --schedule-policy fair; 1 where it is not told


class VllmLoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    lora_path: Name  # folder on the server, or hub id
    load_inplace: bool | None = None  # accepted when not true


class AdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names one adapter: to unload, pin or unpin."""

    lora_name: Name


class VllmUnloadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    lora_int_id: int | None = None  # ignored


class ErrorFields(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class AdapterResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every route here answers; vLLM's answer a line of text where they succeed."""

    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str]  # name -> source, as the caller gave it
    error: ErrorFields | None = None  # only where it failed


def routes() -> list[BaseRoute]:
    return [
        Route("/load_lora_adapter", load_lora_adapter, methods=["POST"]),
        Route("/unload_lora_adapter", unload_lora_adapter, methods=["POST"]),
        Route("/pin_lora_adapter", pin_lora_adapter, methods=["POST"]),
        Route("/unpin_lora_adapter", unpin_lora_adapter, methods=["POST"]),
        Route("/v1/load_lora_adapter", vllm_load_lora_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", vllm_unload_lora_adapter, methods=["POST"]),
    ]


async def load_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: LoadAdapterRequest) -> None:
        await _load(gateway, body.lora_name, body.lora_path, pinned=bool(body.pinned), weight=body.weight or 1.0)

    return await _answer(request, LoadAdapterRequest, act)


async def unload_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: AdapterRequest) -> None:
        await gateway.client.unload_adapter(body.lora_name)

    return await _answer(request, AdapterRequest, act)


async def pin_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: AdapterRequest) -> None:
        await gateway.client.pin_adapter(body.lora_name, True)

    return await _answer(request, AdapterRequest, act)


async def unpin_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: AdapterRequest) -> None:
        await gateway.client.pin_adapter(body.lora_name, False)

    return await _answer(request, AdapterRequest, act)


async def vllm_load_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: VllmLoadAdapterRequest) -> None:
        if body.load_inplace:
            raise not_supported("load_inplace")
        await _load(gateway, body.lora_name, body.lora_path, pinned=False)

    return await _answer(request, VllmLoadAdapterRequest, act, text="Success: the adapter is loaded.")


async def vllm_unload_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: VllmUnloadAdapterRequest) -> None:
        await gateway.client.unload_adapter(body.lora_name)

    return await _answer(request, VllmUnloadAdapterRequest, act, text="Success: the adapter is unloaded.")


async def _load(gateway: Gateway, name: str, source: str, *, pinned: bool, weight: float = 1.0) -> None:
    if problem := name_problem(name, gateway.client.model.served_name):
        raise bad_request(f"'lora_name': {problem}.", param="lora_name", code="adapter_invalid")
    await gateway.client.load_adapter(name, source, pinned=pinned, weight=weight)


async def _answer(
    request: Request, kind: type[T], act: Callable[[Gateway, T], Awaitable[None]], *, text: str | None = None
) -> Response:
    """Parses, acts and answers. A client that goes away does not stop what it began."""
    gateway = gateway_of(request)
    try:
        await act(gateway, parse(await read_body(request), kind))
    except ApiError as error:
        return _failed(gateway, error)
    except EngineError as error:
        return _failed(gateway, _about_adapter(from_engine(error)))
    if text is not None:
        return PlainTextResponse(text)
    return _json(AdapterResult(success=True, error_message=None, loaded_adapters=loaded_adapters(gateway)))


def loaded_adapters(gateway: Gateway) -> dict[str, str]:
    """Every adapter that requests may name, with its source; those whose load failed are left out."""
    adapters = gateway.client.adapters.values()
    return {a.name: a.source for a in adapters if is_served(a) and a.state is not AdapterState.FAILED}


def _about_adapter(error: ApiError) -> ApiError:
    """Here the adapter is named by `lora_name`, not by `model`."""
    if error.param == "model":
        error.param, error.code = "lora_name", "adapter_not_found"
    return error


def _failed(gateway: Gateway, error: ApiError) -> Response:
    fields = ErrorFields(message=error.message, type=error.type, param=error.param, code=error.code)
    result = AdapterResult(
        success=False, error_message=error.message, loaded_adapters=loaded_adapters(gateway), error=fields
    )
    return _json(result, error.status, error.headers)


def _json(data: AdapterResult, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers=headers, media_type="application/json")

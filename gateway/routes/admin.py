"""Loading, unloading and pinning adapters: SGLang's routes, and vLLM's with the same effects and statuses."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from engine.types import AdapterInfo, AdapterState, EngineError
from gateway.disconnect import read_body
from gateway.errors import ApiError, bad_request, from_engine
from gateway.lora_paths import Weight, name_problem
from gateway.models import is_served
from gateway.protocol.parse import parse
from gateway.routes.openai import gateway_of
from gateway.state import Engine, Gateway

T = TypeVar("T", bound=msgspec.Struct)
Name = Annotated[str, msgspec.Meta(min_length=1)]


LoadSeconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
DrainSeconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
UNLOAD_SECONDS = 30.0


class LoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    lora_path: Name  # folder on the server, or hub id
    pinned: bool | None = None  # in place, where it is not told: as it was
    weight: Weight | None = None  # of its share under --schedule-policy fair; 1, or in place as it was
    revision: Name | None = None  # of a hub repository
    load_inplace: bool | None = None  # a name that is loaded gets these weights
    timeout: LoadSeconds | None = None  # seconds until an adapter that is not there yet is given up


class VllmLoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    lora_path: Name  # folder on the server, or hub id
    load_inplace: bool | None = None  # a name that is loaded gets these weights
    revision: Name | None = None  # of a hub repository
    timeout: LoadSeconds | None = None  # seconds until an adapter that is not there yet is given up


class AdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names one adapter, to pin or unpin."""

    lora_name: Name


class UnloadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    timeout: DrainSeconds | None = None  # seconds until what still uses it is ended; 30 where it is not told
    force: bool | None = None  # it is ended at once


class VllmUnloadAdapterRequest(UnloadAdapterRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_int_id: int | None = None  # ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A load, wherever its files come from."""

    name: str
    pinned: bool | None = None  # None: no, or in place as it was
    weight: float | None = None  # None: 1, or in place as it was
    revision: str | None = None
    inplace: bool = False
    timeout: float | None = None  # seconds


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
    loaded_adapters: dict[str, str]  # name -> source, as the caller gave it; "(uploaded)" for an upload
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
        wanted = _wanted(gateway, body)
        await load(gateway, replace(wanted, pinned=body.pinned, weight=body.weight), body.lora_path)

    return await _do(request, LoadAdapterRequest, act)


async def unload_lora_adapter(request: Request) -> Response:
    return await _do(request, UnloadAdapterRequest, _unload)


async def pin_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: AdapterRequest) -> None:
        await gateway.client.pin_adapter(body.lora_name, True)
        await gateway.keeper.pinned(body.lora_name, True)

    return await _do(request, AdapterRequest, act)


async def unpin_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: AdapterRequest) -> None:
        await gateway.client.pin_adapter(body.lora_name, False)
        await gateway.keeper.pinned(body.lora_name, False)

    return await _do(request, AdapterRequest, act)


async def vllm_load_lora_adapter(request: Request) -> Response:
    async def act(gateway: Gateway, body: VllmLoadAdapterRequest) -> None:
        await load(gateway, _wanted(gateway, body), body.lora_path)

    return await _do(request, VllmLoadAdapterRequest, act, text="Success: the adapter is loaded.")


async def vllm_unload_lora_adapter(request: Request) -> Response:
    return await _do(request, VllmUnloadAdapterRequest, _unload, text="Success: the adapter is unloaded.")


def check_name(gateway: Gateway, name: str) -> None:
    """Raises ApiError (400) for a name that no adapter of this server may bear."""
    if problem := name_problem(name, gateway.client.model.served_name):
        raise bad_request(f"'lora_name': {problem}.", param="lora_name", code="adapter_invalid")


async def load(gateway: Gateway, wanted: Wanted, source: str) -> None:
    """Returns when the adapter serves. Raises EngineError with the reason."""
    before = gateway.client.adapters.get(wanted.name)
    replaced = before if wanted.inplace else None
    try:
        info = await gateway.client.load_adapter(
            wanted.name,
            source,
            pinned=wanted.pinned,
            revision=wanted.revision,
            weight=wanted.weight,
            inplace=wanted.inplace,
            timeout=wanted.timeout,
        )
    except EngineError:
        if (left := loaded_nevertheless(gateway, wanted.name, source, before)) is not None:
            await gateway.keeper.loaded(left, source, replaced)
        raise
    await gateway.keeper.loaded(info, source, replaced)


def loaded_nevertheless(gateway: Gateway, name: str, source: str, before: AdapterInfo | None) -> AdapterInfo | None:
    """What a load that failed left loaded: a pinned adapter stays on the host where it cannot come to the arena."""
    left = gateway.client.adapters.get(name)
    if left is None or left.source != source or not is_served(left):
        return None
    known = before is not None and (before.adapter_id, before.source) == (left.adapter_id, source)
    return None if known else left


def _wanted(gateway: Gateway, body: LoadAdapterRequest | VllmLoadAdapterRequest) -> Wanted:
    check_name(gateway, body.lora_name)
    return Wanted(name=body.lora_name, revision=body.revision, inplace=bool(body.load_inplace), timeout=body.timeout)


async def _unload(gateway: Gateway, body: UnloadAdapterRequest) -> None:
    timeout = UNLOAD_SECONDS if body.timeout is None else body.timeout
    try:
        await gateway.client.unload_adapter(body.lora_name, timeout=timeout, force=bool(body.force))
    except EngineError:
        if _died_draining(gateway.client, body.lora_name):
            await gateway.keeper.unloaded(body.lora_name)
        raise
    await gateway.keeper.unloaded(body.lora_name)


def _died_draining(engine: Engine, name: str) -> bool:
    """Whether the engine died with this unload under way: the next one is started without the adapter."""
    adapter = engine.adapters.get(name)
    return not engine.alive and adapter is not None and adapter.state is AdapterState.DRAINING


async def _do(
    request: Request, kind: type[T], act: Callable[[Gateway, T], Awaitable[None]], *, text: str | None = None
) -> Response:
    """Parses, acts and answers."""
    gateway = gateway_of(request)

    async def work() -> None:
        await act(gateway, parse(await read_body(request), kind))

    return await answer(gateway, work(), text=text)


async def answer(gateway: Gateway, work: Awaitable[None], *, text: str | None = None) -> Response:
    """The answer to what `work` does. A client that goes away does not stop what it began."""
    try:
        await work
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
    told = gateway.keeper.told_source
    return {a.name: told(a) for a in adapters if is_served(a) and a.state is not AdapterState.FAILED}


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

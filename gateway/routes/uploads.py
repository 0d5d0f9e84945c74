"""POST /v1/lora_adapters: an adapter comes in the request's own body, is written to the spool and loaded from there.

Written as it comes, in threads; whatever goes wrong, nothing of it stays.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from engine.types import CONFIG_FILE, TENSORS_FILE, ErrorCode
from gateway.disconnect import ClientGone
from gateway.errors import ApiError, bad_request
from gateway.lora_paths import Weight
from gateway.multipart import FormReader, boundary_of
from gateway.protocol.parse import convert
from gateway.routes.admin import Name, Wanted, answer, check_name, load
from gateway.routes.openai import gateway_of
from gateway.state import Gateway

PATH = "/v1/lora_adapters"
MAX_CONFIG = 2**20  # bytes, as the engine reads it
FILES = {CONFIG_FILE: MAX_CONFIG, TENSORS_FILE: None}  # None: what the whole body may have
WRITE_BYTES = 2**20  # of the body are gathered before a thread takes them
SILENCE_SECONDS = 60.0  # a client that sends nothing for so long is given up


class UploadFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form's fields beside its two files, each as text."""

    lora_name: Name
    pinned: bool | None = None
    weight: Weight | None = None  # of its share under --schedule-policy fair; 1, or as it was
    load_inplace: bool = False  # a name that is loaded gets these weights


FIELDS = frozenset(field.name for field in msgspec.structs.fields(UploadFields))


def routes() -> list[BaseRoute]:
    return [Route(PATH, upload_adapter, methods=["POST"])]


async def upload_adapter(request: Request) -> Response:
    return await answer(gateway_of(request), _upload(request))


async def _upload(request: Request) -> None:
    gateway = gateway_of(request)
    boundary = boundary_of(request.headers.get("content-type", ""))
    if not gateway.client.model.enable_lora:
        raise bad_request("this server was started without --enable-lora", code=ErrorCode.LORA_DISABLED.value)
    spool = gateway.keeper.spool
    try:
        staged = await asyncio.to_thread(spool.stage)
    except OSError as error:
        raise _not_written(error) from error
    try:
        fields = await _receive(request, boundary, staged)
        wanted = _wanted(gateway, fields)
        token = await asyncio.to_thread(spool.commit, staged)
    except OSError as error:
        raise _not_written(error) from error
    finally:
        await asyncio.to_thread(spool.discard, staged)
    try:
        await load(gateway, wanted, str(spool.path(token)))
    except BaseException:
        if not gateway.keeper.holds(token):  # it may be loaded, whatever failed after that
            await asyncio.to_thread(spool.remove, token)
        raise


def _wanted(gateway: Gateway, fields: dict[str, str]) -> Wanted:
    told = convert(fields, UploadFields)
    check_name(gateway, told.lora_name)
    return Wanted(name=told.lora_name, pinned=told.pinned, weight=told.weight, inplace=told.load_inplace)


async def _receive(request: Request, boundary: bytes, folder: Path) -> dict[str, str]:
    """Writes the form's files to the folder; its fields."""
    reader = FormReader(boundary, folder, FILES, FIELDS)
    try:
        async for data in _gathered(request):
            await asyncio.to_thread(reader.feed, data)
        return reader.finish()
    finally:
        reader.close()


async def _gathered(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces that are worth a thread's while."""
    pieces = bytearray()
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                pieces += await anext(stream)
            if len(pieces) >= WRITE_BYTES:
                yield bytes(pieces)
                pieces.clear()
    except StopAsyncIteration:
        yield bytes(pieces)
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        message = f"Nothing came for {SILENCE_SECONDS:.0f} s."
        raise ApiError(408, message, code="upload_timeout", headers={"connection": "close"}) from None


def _not_written(error: OSError) -> ApiError:
    return ApiError(507, f"The upload cannot be written: {error.strerror}.", code="spool_full")

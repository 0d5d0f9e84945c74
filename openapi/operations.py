"""What is served, one entry an operation; `generate.py` makes openapi.yaml of it. A test compares it with the app."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.adapters import AdapterList
from gateway.models import ModelCard, ModelList
from gateway.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from gateway.protocol.completions import Completion, CompletionRequest
from gateway.protocol.native import Generated, GenerateRequest
from gateway.routes import uploads
from gateway.routes.admin import (
    AdapterRequest,
    AdapterResult,
    ErrorFields,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    VllmLoadAdapterRequest,
    VllmUnloadAdapterRequest,
)
from gateway.routes.health import Health, ModelFacts
from gateway.status import ServerStatus


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Every refusal and failure."""

    error: ErrorFields


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path. `answer`: a type, or None for plain text."""

    method: str
    path: str
    id: str
    tag: str
    summary: str
    request: Any = None
    files: tuple[str, ...] = ()  # the request is a form then, with these beside the fields of `request`
    answer: Any = None
    event: Any = None  # what an event of a stream holds, where `stream: true` asks for one
    failure: Any = ErrorAnswer  # the answer where the operation fails
    failures: tuple[int, ...] = (401, 500, 503)
    security: str | None = "apiKey"
    media_type: str = "application/json"


def _admin(
    path: str, id: str, summary: str, request: Any, *, text: bool = False, files: tuple[str, ...] = (),
    failures: tuple[int, ...] = (400, 404, 503),
) -> Operation:  # fmt: skip
    """An operation that changes the server; vLLM's answer a line of text."""
    return Operation(
        method="post",
        path=path,
        id=id,
        tag="Adapters",
        summary=summary,
        request=request,
        files=files,
        answer=None if text else AdapterResult,
        failure=AdapterResult,
        failures=failures,
        security="adminKey",
        media_type="text/plain" if text else "application/json",
    )


GENERATING = (400, 401, 404, 413, 500, 503)

OPERATIONS = (
    Operation(
        method="post",
        path="/v1/chat/completions",
        id="createChatCompletion",
        tag="OpenAI",
        summary="Answers a conversation, by the base or by one of its adapters",
        request=ChatRequest,
        answer=ChatCompletion,
        event=ChatChunk,
        failures=GENERATING,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        id="createCompletion",
        tag="OpenAI",
        summary="Continues one or several prompts, by the base or by one of its adapters",
        request=CompletionRequest,
        answer=Completion,
        event=Completion,
        failures=GENERATING,
    ),
    Operation(
        method="get",
        path="/v1/models",
        id="listModels",
        tag="OpenAI",
        summary="Lists the base and its adapters",
        answer=ModelList,
    ),
    Operation(
        method="get",
        path="/v1/models/{model}",
        id="getModel",
        tag="OpenAI",
        summary="Tells of the base or of one adapter",
        answer=ModelCard,
        failures=(401, 404, 500, 503),
    ),
    Operation(
        method="post",
        path="/generate",
        id="generate",
        tag="SGLang",
        summary="Continues one or several prompts, each by an adapter of its own",
        request=GenerateRequest,
        answer=Generated | list[Generated],
        event=Generated,
        failures=(400, 401, 413, 500, 503),
    ),
    Operation(
        method="get",
        path="/get_model_info",
        id="getModelInfo",
        tag="SGLang",
        summary="Tells what is served, and its limits",
        answer=ModelFacts,
    ),
    Operation(
        method="get",
        path="/v1/lora_adapters",
        id="listLoraAdapters",
        tag="Adapters",
        summary="Lists the adapters with their state, tier and traffic",
        answer=AdapterList,
    ),
    Operation(
        method="get",
        path="/status",
        id="status",
        tag="Server",
        summary="Tells the arena by use, the slots and the base's traffic",
        answer=ServerStatus,
    ),
    _admin(
        uploads.PATH,
        "uploadLoraAdapter",
        "Loads an adapter whose files come in the form",
        uploads.UploadFields,
        files=tuple(uploads.FILES),
        failures=(400, 408, 415, 503, 507),
    ),
    _admin(
        "/load_lora_adapter", "loadLoraAdapter", "Loads an adapter, which then serves by its name", LoadAdapterRequest
    ),
    _admin(
        "/unload_lora_adapter", "unloadLoraAdapter", "Unloads an adapter; accepted requests end", UnloadAdapterRequest
    ),
    _admin("/pin_lora_adapter", "pinLoraAdapter", "Keeps an adapter in the arena until it is unpinned", AdapterRequest),
    _admin("/unpin_lora_adapter", "unpinLoraAdapter", "Lets an adapter be evicted again", AdapterRequest),
    _admin(
        "/v1/load_lora_adapter",
        "vllmLoadLoraAdapter",
        "Loads an adapter, under vLLM's path",
        VllmLoadAdapterRequest,
        text=True,
    ),
    _admin(
        "/v1/unload_lora_adapter",
        "vllmUnloadLoraAdapter",
        "Unloads an adapter, under vLLM's path",
        VllmUnloadAdapterRequest,
        text=True,
    ),
    Operation(
        method="get",
        path="/health",
        id="health",
        tag="Server",
        summary="200 while the engine lives, 503 while it is started again",
        answer=Health,
        failures=(500, 503),
        security=None,
    ),
    Operation(
        method="get",
        path="/metrics",
        id="metrics",
        tag="Server",
        summary="Prometheus metrics",
        failures=(500,),
        security=None,
        media_type="text/plain",
    ),
    Operation(
        method="get",
        path="/",
        id="page",
        tag="Page",
        summary="The live page",
        failures=(500,),
        security=None,
        media_type="text/html",
    ),
    Operation(
        method="get",
        path="/page/{file}",
        id="pageFile",
        tag="Page",
        summary="A style sheet, script or picture of the live page",
        failures=(404, 500),
        security=None,
        media_type="text/javascript",
    ),
)

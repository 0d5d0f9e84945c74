"""A gateway over the scripted engine: in process through ASGI, or behind a real socket."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from engine.types import EngineError
from gateway.errors import ApiError, error_response, to_api_error
from gateway.keeper import Keeper
from gateway.lora_state import fresh
from gateway.models import ModelRegistry
from gateway.prompt import PromptEncoder
from gateway.routes import openai
from gateway.spool import Spool
from gateway.state import Gateway
from tests.gateway.fake_engine import FakeEngine


@dataclass(frozen=True)
class FakeSettings:
    sampling_defaults: str = "model"
    stream_interval: int = 1


@dataclass
class FakeTimer:
    """Keeps what it is told."""

    base: str
    adapter: str
    events: list[object] = field(default_factory=list)

    def first_token(self) -> None:
        self.events.append("first")

    def tokens(self, count: int) -> None:
        self.events.append(count)

    def finished(self, reason: str, prompt_tokens: int, generated: int) -> None:
        self.events.append((reason, prompt_tokens, generated))


@dataclass
class FakeMetrics:
    timers: list[FakeTimer] = field(default_factory=list)

    def request_started(self, base: str, adapter: str) -> FakeTimer:
        self.timers.append(FakeTimer(base, adapter))
        return self.timers[-1]


def make_keeper(folder: Path = Path("/nowhere")) -> Keeper:
    """One without a file; its spool is made in the folder when something is uploaded."""
    return Keeper(Spool(folder / "spool"), fresh())


def make_gateway(
    engine: FakeEngine, folder: Path, settings: FakeSettings | None = None, chat_template: str | None = None
) -> Gateway:
    return Gateway(
        client=engine,
        registry=ModelRegistry(engine),
        prompts=PromptEncoder.load(folder, engine.model.vocab_size, chat_template),
        settings=settings or FakeSettings(),
        metrics=FakeMetrics(),
        keeper=make_keeper(folder),
    )


def make_app(gateway: Gateway) -> Starlette:
    """The OpenAI routes alone, with their errors in OpenAI's shape."""
    app = Starlette(routes=openai.routes(), exception_handlers={ApiError: _answer_error, EngineError: _answer_error})
    app.state.gateway = gateway
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(to_api_error(error))


def asgi_client(app: Starlette) -> httpx.AsyncClient:
    """For plain requests; streams need a real socket."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


class SocketServer(uvicorn.Server):
    """Uvicorn inside a test: tells when it listens, and leaves the signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, http: Any = "auto") -> AsyncIterator[str]:
    """Runs the app behind a socket on the loopback interface; yields its address. `http`: uvicorn's protocol."""
    config = uvicorn.Config(app, http=http, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = SocketServer(config)
    task = asyncio.create_task(server.serve())
    await server.listening.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task

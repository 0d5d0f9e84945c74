"""The whole application over the scripted engine, with real settings and metrics."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from engine.config import EngineConfig
from gateway.app import create_app
from gateway.metrics import Metrics
from gateway.models import ModelRegistry
from gateway.prompt import PromptEncoder
from gateway.settings import Settings
from gateway.state import Gateway
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.harness import make_keeper
from tests.gateway.tokenizer_files import write_folder

LOCAL = ("127.0.0.1", 40000)


@dataclass(frozen=True)
class App:
    """An application and what it is made of."""

    asgi: Starlette
    engine: FakeEngine
    metrics: Metrics
    settings: Settings

    def client(self, peer: tuple[str, int] = LOCAL, **headers: str) -> httpx.AsyncClient:
        """Plain requests in process, as if from `peer`."""
        transport = httpx.ASGITransport(app=self.asgi, client=peer)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


def make_app(folder: Path, engine: FakeEngine | None = None, **settings: Any) -> App:
    """`settings` replace the defaults of `Settings`."""
    engine = engine or FakeEngine()
    chosen, metrics = Settings(engine=EngineConfig(), **settings), Metrics()
    metrics.engine_started(engine.model)
    gateway = Gateway(
        client=engine,
        registry=ModelRegistry(engine),
        prompts=PromptEncoder.load(write_folder(folder), engine.model.vocab_size),
        settings=chosen,
        metrics=metrics,
        keeper=make_keeper(folder),
    )
    return App(create_app(gateway, chosen, metrics), engine, metrics, chosen)


@contextlib.asynccontextmanager
async def client_of(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with app.client() as client:
        yield client

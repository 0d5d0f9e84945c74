"""Keeps one engine running: notices that it died or hangs, and starts another with what was served.

A `Gateway` belongs to one engine, so that no request meets another engine's adapter ids; each new one is published.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import jinja2
import msgspec

from engine.client import EngineClient
from engine.config import EngineConfig, LoraPath
from engine.types import AdapterState, EngineError, ErrorCode
from gateway.chat_template import TemplateMissing
from gateway.engine_process import COMMAND, EngineProcess
from gateway.keeper import Keeper
from gateway.lazy import Lazy
from gateway.metrics import Metrics
from gateway.models import ModelRegistry
from gateway.prompt import PromptEncoder
from gateway.settings import Settings
from gateway.state import Gateway
from gateway.tokenizer import TokenizerError
from gateway.warmup import try_to_warm_up, warm_up

SILENCE_SECONDS = 10.0  # without a heartbeat for so long, an engine is taken for hung
CHECK_SECONDS = 1.0
RESTART_SECONDS = 600.0  # a restart that takes longer has failed
FIRST_BACKOFF = 1.0  # seconds; doubles with each try
LONGEST_BACKOFF = 30.0
WARM_UP_SECONDS = 30.0  # an engine that is started again serves after this, warmed up or not
STEADY_SECONDS = 60.0  # an engine that lived so long died of something new

log = logging.getLogger(__name__)


class Supervisor:
    """`start` once, then `watch`, then `stop`."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        keeper: Keeper,
        *,
        lazy: Lazy | None = None,
        command: Sequence[str] = COMMAND,
        silence: float = SILENCE_SECONDS,
        check: float = CHECK_SECONDS,
        backoff: float = FIRST_BACKOFF,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._command = command
        self._silence = silence
        self._check = check
        self._backoff = backoff
        self._keeper = keeper
        self._lazy = lazy
        self._config = keeper.start_config(settings.engine, (*settings.lora_preload, *settings.lora_warm))
        self._process: EngineProcess | None = None
        self._prompts: PromptEncoder | None = None
        self._watch: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None

    async def start(self) -> Gateway:
        """The first start.

        Raises:
            EngineError: the engine could not start, or its tokenizer or chat template cannot be read.
        """
        gateway = self._adopt(await EngineProcess.start(self._config, self._command))
        await warm_up(gateway, self._settings)
        return gateway

    def watch(self, publish: Callable[[Gateway], None]) -> "asyncio.Task[None]":
        """Watches the engine and replaces it as often as needed; `publish` gets each new gateway.

        The task ends with `stop`; where it ends before, that is a fault of ours.
        """
        self._watch = asyncio.create_task(self._run(publish), name="supervisor")
        return self._watch

    async def stop(self) -> None:
        """Ends the engine, whatever state it is in, for good. What it has not answered fails."""
        for task in (self._watch, self._warming):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._process is not None:
            await self._process.stop()

    async def _run(self, publish: Callable[[Gateway], None]) -> None:
        while True:
            process = self._running()
            since = self._now()
            reason = await self._until_lost(process.client)
            left = process.client.open_requests
            self._config = restored_config(self._config, process.client)
            process.client.on_stats = None
            self._metrics.engine_lost()
            code = await process.kill()
            self._keeper.engine_lost()
            log.error(
                "the engine is lost: %s (exit status %d, %d requests open); starting it again", reason, code, left
            )
            publish(await self._restart(quick=self._now() - since < STEADY_SECONDS))

    async def _until_lost(self, client: EngineClient) -> str:
        while not client.closed.is_set():
            before = self._now()
            await _wait(client.closed, self._check)
            if self._now() - before > self._check + self._silence / 4:
                continue  # this process itself stood still; what the engine sent is yet to be read
            if client.hung:
                return "a step hangs"
            if (silent := self._now() - client.last_heartbeat) > self._silence:
                return f"no sign of life for {silent:.0f} s"
        return "its process ended"

    async def _restart(self, *, quick: bool) -> Gateway:
        delay = self._backoff if quick else 0.0
        while True:
            await asyncio.sleep(delay)
            try:
                async with asyncio.timeout(RESTART_SECONDS):
                    gateway = self._adopt(await EngineProcess.start(self._config, self._command))
            except (EngineError, TimeoutError) as error:
                delay = min(LONGEST_BACKOFF, max(self._backoff, delay * 2))
                log.error("the engine could not be started again (next try in %.0f s): %s", delay, error)
            else:
                await self._warm_up(gateway)
                log.warning("the engine serves again, with %d adapters", len(gateway.client.adapters))
                return gateway

    async def _warm_up(self, gateway: Gateway) -> None:
        """Returns when it has ended, the engine is lost or enough time has passed; it goes on beside requests then."""
        self._warming = asyncio.create_task(try_to_warm_up(gateway, self._settings), name="warm-up")
        lost = asyncio.create_task(self._until_lost(self._running().client))
        try:
            await asyncio.wait({self._warming, lost}, timeout=WARM_UP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if self._warming.done():
            self._warming.result()

    def _adopt(self, process: EngineProcess) -> Gateway:
        """The gateway of an engine that is ready."""
        self._process = process
        client = process.client
        client.on_stats = self._metrics.update
        client.on_removed = self._keeper.removed
        self._metrics.engine_started(client.model)
        if self._prompts is None:
            self._prompts = _load_prompts(client, self._settings)
        return Gateway(
            client=client,
            registry=ModelRegistry(client, self._lazy),
            prompts=self._prompts,
            settings=self._settings,
            metrics=self._metrics,
            keeper=self._keeper,
        )

    def _running(self) -> EngineProcess:
        assert self._process is not None, "start() comes first"
        return self._process

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def restored_config(config: EngineConfig, client: EngineClient) -> EngineConfig:
    """`config` with the adapters that `client` served, their pins, and the limits that were in force."""
    if not client.model.enable_lora:
        return config
    served = [adapter for adapter in client.adapters.values() if adapter.state is not AdapterState.DRAINING]
    return msgspec.structs.replace(
        config,
        enable_lora=True,
        max_lora_rank=client.model.max_lora_rank,  # else they would be inferred from the adapters anew
        lora_target_modules=client.model.lora_target_modules,
        lora_paths=(),
        lora_restored=tuple(
            LoraPath(name=a.name, path=a.source, pinned=a.pinned, weight=a.weight, revision=a.revision) for a in served
        ),
    )


def _load_prompts(client: EngineClient, settings: Settings) -> PromptEncoder:
    try:
        return PromptEncoder.load(client.model.folder, client.model.vocab_size, settings.chat_template)
    except (TokenizerError, TemplateMissing) as error:
        raise EngineError(ErrorCode.INVALID_REQUEST, str(error)) from error
    except jinja2.TemplateSyntaxError as error:
        raise EngineError(
            ErrorCode.INVALID_REQUEST, f"the chat template is broken in line {error.lineno}: {error.message}"
        ) from error


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, or so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return

"""The server's life: bind, start the engine, serve, stop. Called by the command line; returns the exit code."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
import uvloop

from gateway.app import create_app
from gateway.banner import summary
from gateway.collector import collecting_less
from gateway.engine_process import COMMAND
from gateway.keeper import Keeper
from gateway.lazy import Lazy
from gateway.logs import configure_logging
from gateway.malformed import HttpProtocol
from gateway.metrics import Metrics
from gateway.settings import Settings, SettingsError
from gateway.supervisor import Supervisor

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 65  # longer than clients keep idle connections, so that none is closed under a request
T = TypeVar("T")

log = logging.getLogger(__name__)


def run(settings: Settings, command: Sequence[str] = COMMAND) -> int:
    """Serves until a signal ends it, the engine started by `command`.

    Raises:
        SettingsError: the address cannot be had.
        EngineError: the engine could not start.
    """
    configure_logging(settings.log_level)
    with bind(settings.host, settings.port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings, listener, command))


def bind(host: str, port: int) -> socket.socket:
    """Takes the address before anything is loaded; nobody can connect before the server listens."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SettingsError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return listener


async def serve(settings: Settings, listener: socket.socket, command: Sequence[str] = COMMAND) -> int:
    """Starts the engine by `command`, serves on `listener`, and stops both when a signal comes.

    Raises:
        SettingsError: --lora-state, --lora-dir or --lora-hub-allow name what cannot be had.
        EngineError: the engine could not start.
    """
    metrics = Metrics()
    with Keeper.open(settings) as keeper, stop_signals() as signals:
        supervisor = Supervisor(settings, metrics, keeper, lazy=_lazy(settings), command=command)
        try:
            gateway = await unless_set(signals.first, supervisor.start())
            if gateway is None:
                return 128 + signals.number
            app = create_app(gateway, settings, metrics)
            server = Server(app, settings, lambda: announce(summary(gateway, listener.getsockname())))
            watch = supervisor.watch(lambda new: setattr(app.state, "gateway", new))
            watch.add_done_callback(server.give_up)
            stopper = asyncio.create_task(_stop(signals, server, supervisor, settings.shutdown_timeout))
            with collecting_less():
                await server.serve(sockets=[listener])
            stopper.cancel()
            await asyncio.gather(stopper, return_exceptions=True)
            return server.exit_code
        finally:
            await supervisor.stop()


def _lazy(settings: Settings) -> Lazy | None:
    folder = None if settings.lora_dir is None else Path(settings.lora_dir).expanduser()
    is_wanted = folder is not None or settings.lora_hub_allow
    return Lazy(folder, settings.lora_hub_allow, time.monotonic) if is_wanted else None


async def _stop(signals: "StopSignals", server: "Server", supervisor: Supervisor, seconds: float) -> None:
    """First signal: no new connections, open answers get some time. Then, or at the second: the engine ends."""
    await signals.first.wait()
    log.info("stopping; open answers get %.0f s, a second signal ends them at once", seconds)
    server.should_exit = True
    await unless_set(signals.second, asyncio.sleep(seconds))
    await supervisor.stop()


class Server(uvicorn.Server):
    """Uvicorn without signal handlers of its own, telling when it listens."""

    def __init__(self, app: Any, settings: Settings, on_listening: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                log_config=None,
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                proxy_headers=False,  # who may change the server is judged by the socket's peer
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + 10,
            )
        )
        self.exit_code = 0
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def give_up(self, task: "asyncio.Task[None]") -> None:
        """The supervisor failed, which only a fault of ours can make it do."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the supervisor failed", exc_info=error)
            self.exit_code = 1
            self.should_exit = True


class StopSignals:
    """SIGINT and SIGTERM, counted."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.number = 0

    def __call__(self, number: int) -> None:
        (self.second if self.first.is_set() else self.first).set()
        self.number = number


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handles the signals that stop the server while the block runs."""
    loop = asyncio.get_running_loop()
    signals = StopSignals()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals, number)
    try:
        yield signals
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def unless_set(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None where the event came first, and the work has been cancelled and has ended."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def announce(text: str) -> None:
    """On standard output, where a script may wait for it."""
    sys.stdout.write(text)
    sys.stdout.flush()

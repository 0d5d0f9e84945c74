"""One engine process: started, connected to, and ended so that it never outlives the gateway.

It runs in a session of its own, so that a Ctrl-C at the terminal reaches the gateway alone and all that it started can
be ended with it. When the gateway is killed, the kernel kills the engine (see engine/process.py).
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.types import EngineError, ErrorCode

COMMAND = (sys.executable, "-P", "-m", "engine.process")  # -P: a folder `engine` where the user stands is not meant
CONNECT_PAUSE = 0.02  # seconds between two attempts to connect
# Weights in pages of 2 MiB, and one heap that keeps what a step gives back: its tensors never cost the kernel's work.
TUNABLES = {
    "hugetlb": 1,
    "arena_max": 1,
    "mmap_threshold": 32 << 20,  # the largest that glibc takes
    "trim_threshold": 256 << 20,
    "top_pad": 64 << 20,
    "tcache_count": 200,  # small blocks of a size that a thread keeps: seven are too few for what an operation takes
}
# OpenMP's threads spin between a step's operations, for about 0.1 ms: the default would keep a core for milliseconds
# after the step, from work that runs in the break before the next.
SPINS = "5000"
SECRETS = ("LORAMUX_API_KEY", "LORAMUX_ADMIN_API_KEY")  # the engine has no use for them


class EngineProcess:
    """A process whose engine is ready; `client` speaks to it."""

    def __init__(self, process: Process, client: EngineClient) -> None:
        self.client = client
        self._process = process

    @classmethod
    async def start(cls, config: EngineConfig, command: Sequence[str] = COMMAND) -> Self:
        """Returns when the engine is ready. Cancelled or failed, it leaves no process behind.

        Raises:
            EngineError: the engine refused to start, or died on the way.
        """
        with tempfile.TemporaryDirectory(prefix="loramux-", ignore_cleanup_errors=True) as folder:  # this user's alone
            path = f"{folder}/engine.sock"
            given = ("--socket", path, "--parent", str(os.getpid()), f"@{_config_file(Path(folder), config)}")
            process = await _spawn([*command, *given])
            try:
                return cls(process, await _connect(path, process))
            except BaseException:
                await _end(process)
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self, seconds: float = 5.0) -> None:
        """Asks the engine to exit, and kills it where it has not after so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.client.shutdown()
                await self._process.wait()
        await self.kill()

    async def kill(self) -> int:
        """Ends the process and whatever it started; returns its exit code (negative: the signal)."""
        code = await _end(self._process)
        await self.client.close()
        return code


def _config_file(folder: Path, config: EngineConfig) -> Path:
    """The settings as arguments in a file, a line each: with many adapters they exceed what a command line holds."""
    path = folder / "arguments"
    text = json.dumps(msgspec.to_builtins(config))  # plain ASCII: no character in it that could end a line
    path.write_text(f"--config\n{text}\n", encoding="ascii")
    return path


async def _spawn(command: Sequence[str]) -> Process:
    return await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, env=_environment(os.environ), start_new_session=True
    )


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The gateway's without its secrets; the allocator tuned for steps on a CPU unless somebody has tuned it."""
    kept = {name: value for name, value in environ.items() if name not in SECRETS}
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    return {"GLIBC_TUNABLES": tunables, "GOMP_SPINCOUNT": SPINS} | kept


async def _connect(path: str, process: Process) -> EngineClient:
    exited = asyncio.create_task(process.wait())
    try:
        while not exited.done():
            try:
                return await EngineClient.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):  # it does not listen yet
                await asyncio.wait({exited}, timeout=CONNECT_PAUSE)
            except EngineError as error:
                if error.code is not ErrorCode.ENGINE_DEAD:
                    raise
                await exited
        reason = f"the engine process ended while it started ({_how(exited.result())}); its own messages are above"
        raise EngineError(ErrorCode.ENGINE_DEAD, reason)
    finally:
        exited.cancel()


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


async def _end(process: Process) -> int:
    """Kills the process's whole session."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return await process.wait()

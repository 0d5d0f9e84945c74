"""The engine's process: `python -m engine.process --socket PATH --parent PID --config JSON`, started by the gateway.

It listens at once, builds the engine while the gateway waits, sends `Ready` or `StartFailed`, and exits when the
gateway's end of the socket closes: no engine outlives its gateway.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from engine.collector import collecting_rarely
from engine.config import EngineConfig
from engine.link import EngineLink, engine_end
from engine.messages import StartFailed
from engine.types import EngineError, ErrorCode

_STREAM_LIMIT = 2**22  # bytes that asyncio buffers before it stops reading the socket
_GATEWAY_SECONDS = 60  # the gateway starts this process and connects at once
_PR_SET_PDEATHSIG = 1
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
log = logging.getLogger("loramux.engine")


def main() -> None:
    parser = argparse.ArgumentParser(fromfile_prefix_chars="@")  # @FILE: the arguments of many adapters are too long
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument(
        "--parent", type=int, required=True, help="the gateway's process, which this one does not outlive"
    )
    parser.add_argument("--config", required=True, help="an EngineConfig as JSON")
    args = parser.parse_args()
    config = msgspec.json.decode(args.config, type=EngineConfig)
    logging.basicConfig(level=config.log_level.upper(), format=LOG_FORMAT, datefmt="%H:%M:%S")  # as the gateway's lines
    _die_with(args.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the gateway decides
    sys.exit(uvloop.run(serve(config, args.socket)))


async def serve(config: EngineConfig, path: Path) -> int:
    """Runs one engine for one gateway; returns the process's exit status."""
    accepted: asyncio.Future[EngineLink] = asyncio.get_running_loop().create_future()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if accepted.done():
            writer.close()
        else:
            accepted.set_result(engine_end(reader, writer))

    server = await asyncio.start_unix_server(accept, path, limit=_STREAM_LIMIT)
    os.chmod(path, 0o600)
    async with asyncio.timeout(_GATEWAY_SECONDS):
        link = await accepted
    server.close()
    os.unlink(path)
    return await _serve_gateway(config, link)


async def _serve_gateway(config: EngineConfig, link: EngineLink) -> int:
    from engine.assemble import build  # torch and the weights come in here, with somebody there to hear of failures

    try:
        engine = await build(config, link)
    except Exception as error:
        log.debug("the engine could not start", exc_info=True)
        code = error.code if isinstance(error, EngineError) else ErrorCode.INVALID_REQUEST
        link.post(StartFailed(code=code, message=_reason(error)))
        await link.flush()
        await link.close()
        return 2
    try:
        with collecting_rarely():
            await engine.run()
    except Exception:
        log.exception("the engine failed and exits")
        return 1
    finally:
        await link.close()
        engine.close()
    return 0


def _reason(error: Exception) -> str:
    """Our own refusals speak for themselves; what is unforeseen is named with its type."""
    from engine.models.config import UnsupportedModelError
    from engine.models.source import ModelSourceError
    from engine.worker.memory import StartupError

    known = isinstance(error, EngineError | ModelSourceError | UnsupportedModelError | StartupError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _die_with(parent: int) -> None:
    """The kernel ends this process with its parent, also while weights load and nobody reads the socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before the kernel knew
        sys.exit("the gateway is gone")


if __name__ == "__main__":
    main()

"""How the gateway logs: one line an event on standard error, with time and level."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(level: str) -> None:
    """Sets up the root logger once, at start; libraries speak only when something is wrong."""
    logging.basicConfig(level=level.upper(), format=FORMAT, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)  # at debug it would log what is answered
    if level != "debug":
        for name in ("uvicorn", "asyncio", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)

"""Work for a client that may go away: when it does, the work is cancelled at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from gateway.errors import ApiError

T = TypeVar("T")


class ClientGone(ApiError):
    """Nobody reads this answer; 499 is what access logs call it."""

    def __init__(self) -> None:
        super().__init__(499, "The client closed the connection.")


async def read_body(request: Request) -> bytes:
    """The whole body. Raises ClientGone."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGone from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which runs in a task of its own; the request's body must have been read.

    Raises:
        ClientGone: the client went first. The work has been cancelled and has ended.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task)
        await _cancel(watcher)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

"""The path that every generating route shares: jobs to the engine, pieces of all choices back as they come.

However the iteration ends (finished, failed, closed because the client went), nothing of it goes on in the engine.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self

from engine.messages import SequenceOutput
from gateway.choice import Choice, Job, Piece
from gateway.state import Gateway, Generation

News = tuple["Track", list[SequenceOutput]]
Queue = asyncio.Queue["News | Exception | None"]


async def run(gateway: Gateway, jobs: Sequence[Job]) -> AsyncGenerator[list[Piece], None]:
    """Pieces of all choices, in lists of what came together; a choice's last piece has a finish reason.

    Choice `i` of job `j` has the index j * n + i; all jobs of a call have the same n. Iterate it inside
    `contextlib.aclosing`, so that leaving early aborts at once.

    Raises:
        EngineError: the engine refused or lost one of the jobs; the others are aborted.
    """
    async with contextlib.AsyncExitStack() as stack:
        tracks = [await stack.enter_async_context(Track(gateway, i, job)) for i, job in enumerate(jobs)]
        news = await stack.enter_async_context(contextlib.aclosing(_merge(tracks)))
        async for batch in news:
            pieces = [piece for track, outputs in batch for piece in track.pieces(outputs)]
            if pieces:
                yield pieces


class Track:
    """One job in the engine, with its choices."""

    def __init__(self, gateway: Gateway, index: int, job: Job) -> None:
        self._job = job
        self._generation = gateway.client.generate(
            prompt=job.prompt,
            params=job.params,
            n=job.n,
            adapter_id=job.model.adapter_id,
            salt=job.salt,
            priority=job.priority,
        )
        self._choices = [
            Choice(
                index * job.n + i,
                job,
                gateway.prompts.tokenizer,
                gateway.metrics.request_started(job.model.base, job.model.adapter or ""),
            )
            for i in range(job.n)
        ]

    @property
    def generation(self) -> Generation:
        return self._generation

    def pieces(self, outputs: list[SequenceOutput]) -> list[Piece]:
        """What the outputs add; a choice that a stop string ended is aborted in the engine."""
        return [self._piece(output) for output in outputs if not self._choices[output.choice].finished]

    def _piece(self, output: SequenceOutput) -> Piece:
        piece = self._choices[output.choice].push(output)
        if piece.finish is not None and output.finish is None:
            self._generation.abort(output.choice)
        return piece

    async def __aenter__(self) -> Self:
        await self._generation.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for choice in self._choices:
            choice.abandon()
        await self._generation.__aexit__(kind, error, trace)


async def _merge(tracks: list[Track]) -> AsyncGenerator[list[News], None]:
    """What the tracks bring, in the order in which it comes."""
    if len(tracks) == 1:
        async for outputs in tracks[0].generation:
            yield [(tracks[0], outputs)]
        return
    queue: Queue = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(track, queue)) for track in tracks]
    try:
        open_tracks = len(tracks)
        while open_tracks:
            items = await _drain(queue)
            yield [item for item in items if item is not None]
            open_tracks -= items.count(None)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(track: Track, queue: Queue) -> None:
    try:
        async for outputs in track.generation:
            queue.put_nowait((track, outputs))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


async def _drain(queue: Queue) -> list[News | None]:
    """Waits for one item and takes all that are there; raises a failure among them."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    for item in items:
        if isinstance(item, Exception):
            raise item
    return [item for item in items if not isinstance(item, Exception)]

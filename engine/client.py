"""The gateway's view of the engine: requests in, streams of outputs out, over one link.

Every generation ends in exactly one of finished, failed, aborted; when the link ends, all that is open fails.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self, assert_never

from engine.link import GatewayLink, gateway_end
from engine.messages import (
    Abort,
    AdapterRemoved,
    AdapterUpdated,
    CallResult,
    Command,
    Event,
    GetStats,
    Heartbeat,
    LoadAdapter,
    OfferAdapter,
    PinAdapter,
    Ready,
    RequestFailed,
    SequenceOutput,
    Shutdown,
    StartFailed,
    Stats,
    StepOutputs,
    Submit,
    UnloadAdapter,
)
from engine.types import AdapterInfo, EngineError, ErrorCode, ModelInfo, SamplingParams

_STREAM_LIMIT = 2**20  # bytes that asyncio buffers before it stops reading the socket


class Generation:
    """One request's outputs, as they come. Leaving the `async with` block aborts what is unfinished."""

    def __init__(self, client: "EngineClient", request_id: int, choices: int) -> None:
        self.request_id = request_id
        self._client = client
        self._open = set(range(choices))
        self._inbox: asyncio.Queue[list[SequenceOutput] | EngineError] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        """What the next step, or the steps since the last call, brought for the open choices."""
        while self._open:
            outputs = self._take(await self._inbox.get())
            while not self._inbox.empty():
                outputs += self._take(self._inbox.get_nowait())
            if outputs:
                return outputs
        raise StopAsyncIteration

    def abort(self, choice: int | None = None) -> None:
        """Ends one choice or all of them; the engine frees their memory within a step."""
        ended = self._open if choice is None else self._open & {choice}
        if ended:
            self._client.post(Abort(request_id=self.request_id, choice=choice))
        self._close(set(ended))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def deliver(self, item: list[SequenceOutput] | EngineError) -> None:
        """Called by the client for each event about this request."""
        self._inbox.put_nowait(item)

    def _take(self, item: list[SequenceOutput] | EngineError) -> list[SequenceOutput]:
        if isinstance(item, EngineError):
            self._close(set(self._open))
            raise item
        kept = [output for output in item if output.choice in self._open]
        self._close({output.choice for output in kept if output.finish is not None})
        return kept

    def _close(self, choices: set[int]) -> None:
        self._open -= choices
        if not self._open:
            self._client.forget(self.request_id)


class EngineClient:
    """One connected engine. `closed` is set when it is gone; nothing reconnects here (the supervisor does)."""

    def __init__(self, link: GatewayLink, ready: Ready) -> None:
        self.model: ModelInfo = ready.model
        self.adapters: dict[str, AdapterInfo] = {adapter.name: adapter for adapter in ready.adapters}
        self.closed = asyncio.Event()
        self.hung = False
        self.last_heartbeat = asyncio.get_running_loop().time()
        self.on_stats: Callable[[Stats], None] | None = None  # sees every Stats that comes, once
        self.on_removed: Callable[[int], None] | None = None  # sees every adapter_id of which nothing is left
        self._link = link
        self._ids = itertools.count(1)
        self._generations: dict[int, Generation] = {}
        self._calls: dict[int, asyncio.Future[CallResult]] = {}
        self._reader = asyncio.create_task(self._read(), name="engine-client")

    @classmethod
    async def connect(cls, path: str) -> Self:
        """Connects to the engine's Unix socket and waits until it is ready.

        Raises:
            EngineError: the engine refused to start (with its reason), or died on the way.
            OSError: nobody listens at `path` (yet).
        """
        return await cls.over(gateway_end(*await asyncio.open_unix_connection(path, limit=_STREAM_LIMIT)))

    @classmethod
    async def over(cls, link: GatewayLink) -> Self:
        """Waits for `Ready` on a link that stands already."""
        match await link.receive():
            case Ready() as ready:
                return cls(link, ready)
            case StartFailed(code=code, message=message):
                await link.close()
                raise EngineError(code, message)
            case _:
                await link.close()
                raise EngineError(ErrorCode.ENGINE_DEAD, "the engine died while it started")

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    def generate(
        self,
        *,
        prompt: list[int],
        params: SamplingParams,
        n: int = 1,
        adapter_id: int | None = None,
        salt: str | None = None,
        priority: int = 0,
    ) -> Generation:
        """Submits one prompt with `n` choices.

        Raises:
            EngineError: the engine is gone. Its refusals are raised by the iteration.
        """
        self._require_alive()
        generation = Generation(self, next(self._ids), n)
        self._generations[generation.request_id] = generation
        self.post(
            Submit(
                request_id=generation.request_id,
                prompt=prompt,
                n=n,
                adapter_id=adapter_id,
                params=params,
                salt=salt,
                priority=priority,
            )
        )
        return generation

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        pinned: bool | None = None,
        revision: str | None = None,
        weight: float | None = None,
        inplace: bool = False,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Loads an adapter into the host tier (pinned: the arena). Raises EngineError with the reason.

        `inplace`: a name that is loaded gets the weights at `source`. Requests accepted from the answer on use them,
        those accepted before end on the old ones; `pinned` and `weight` stay as they were where they are None. After
        `timeout` seconds an adapter that is not there yet is given up.
        """
        call_id = next(self._ids)
        command = LoadAdapter(
            call_id=call_id, name=name, source=source, pinned=pinned, revision=revision, weight=weight,
            inplace=inplace, timeout=timeout,
        )  # fmt: skip
        return _adapter(await self._call(command, call_id))

    async def offer_adapter(self, name: str, source: str) -> AdapterInfo:
        """Lists an adapter that is read when a request names it; hub repositories are fetched first.

        Raises EngineError: ADAPTER_NOT_FOUND where the hub has no such repository, ADAPTER_UNAVAILABLE where it
        could not be fetched.
        """
        call_id = next(self._ids)
        return _adapter(await self._call(OfferAdapter(call_id=call_id, name=name, source=source), call_id))

    async def unload_adapter(self, name: str, *, timeout: float = 30.0, force: bool = False) -> None:
        """Drains and removes an adapter; after `timeout` seconds (`force`: at once) what still uses it is ended.

        Requests that are ended so fail with ADAPTER_UNAVAILABLE.
        """
        call_id = next(self._ids)
        await self._call(UnloadAdapter(call_id=call_id, name=name, timeout=timeout, force=force), call_id)

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        call_id = next(self._ids)
        return _adapter(await self._call(PinAdapter(call_id=call_id, name=name, pinned=pinned), call_id))

    async def stats(self) -> Stats:
        """Fresh counters, asked of the engine's loop."""
        call_id = next(self._ids)
        result = await self._call(GetStats(call_id=call_id), call_id)
        assert result.stats is not None
        return result.stats

    async def shutdown(self) -> None:
        """Asks the engine to exit and waits until it is gone."""
        self.post(Shutdown())
        await self.closed.wait()

    async def close(self) -> None:
        """Ends the link; the engine exits when it sees that."""
        await self._link.close()
        await self.closed.wait()
        await asyncio.gather(self._reader, return_exceptions=True)

    def post(self, command: Command) -> None:
        self._link.post(command)

    def forget(self, request_id: int) -> None:
        """Called by a generation when it has ended; later events about it are dropped."""
        self._generations.pop(request_id, None)

    @property
    def open_requests(self) -> int:
        """Those whose end was not told yet."""
        return len(self._generations)

    async def _call(self, command: Command, call_id: int) -> CallResult:
        self._require_alive()
        future: asyncio.Future[CallResult] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self.post(command)
            result = await future
        finally:
            self._calls.pop(call_id, None)
        if result.code is not None:
            raise EngineError(result.code, result.message)
        return result

    def _require_alive(self) -> None:
        if not self.alive:
            raise EngineError(ErrorCode.ENGINE_DEAD, "the engine is not running")

    async def _read(self) -> None:
        try:
            while (event := await self._link.receive()) is not None:
                self._dispatch(event)
        finally:
            self._fail_all(EngineError(ErrorCode.ENGINE_DEAD, "the engine stopped while the request was open"))
            self.closed.set()

    def _dispatch(self, event: Event) -> None:
        match event:
            case StepOutputs(outputs=outputs):
                self._deliver(outputs)
            case RequestFailed(request_id=request_id, code=code, message=message):
                if (generation := self._generations.get(request_id)) is not None:
                    generation.deliver(EngineError(code, message))
            case CallResult(call_id=call_id, stats=stats):
                if stats is not None:
                    self._observe(stats)
                if (future := self._calls.get(call_id)) is not None and not future.done():
                    future.set_result(event)
            case AdapterUpdated(adapter=adapter):
                self.adapters[adapter.name] = adapter
            case AdapterRemoved(name=name, adapter_id=adapter_id):
                if name in self.adapters and self.adapters[name].adapter_id == adapter_id:
                    del self.adapters[name]
                if self.on_removed is not None:
                    self.on_removed(adapter_id)
            case Heartbeat(stats=stats, hung=hung):
                self.last_heartbeat = asyncio.get_running_loop().time()
                self.hung = hung
                self._observe(stats)
            case Ready() | StartFailed():
                raise RuntimeError(f"an engine that is ready sent {type(event).__name__}")
            case _:
                assert_never(event)

    def _observe(self, stats: Stats) -> None:
        if self.on_stats is not None:
            self.on_stats(stats)

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        by_request: dict[int, list[SequenceOutput]] = {}
        for output in outputs:
            by_request.setdefault(output.request_id, []).append(output)
        for request_id, mine in by_request.items():
            if (generation := self._generations.get(request_id)) is not None:
                generation.deliver(mine)

    def _fail_all(self, error: EngineError) -> None:
        for generation in list(self._generations.values()):
            generation.deliver(error)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)


def _adapter(result: CallResult) -> AdapterInfo:
    assert result.adapter is not None
    return result.adapter

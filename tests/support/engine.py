"""A whole engine in the test's process: real worker, brain and loop behind an in-memory link."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from engine.arena import ChunkUse
from engine.assemble import Engine, build
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.link import EngineLink, memory_pair
from engine.messages import Stats
from engine.types import FinishReason, SamplingParams, TokenLogprob


@dataclass(slots=True)
class Answer:
    """One choice's whole output."""

    tokens: list[int]
    finish: FinishReason | None
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """`engine` gives a test the parts (counters, `scheduler.check()`), `client` what the gateway has."""

    engine: Engine
    client: EngineClient

    async def ask(
        self, prompt: list[int], params: SamplingParams, *, adapter: str | None = None, n: int = 1
    ) -> list[Answer]:
        """All choices of one request, by adapter name."""
        adapter_id = None if adapter is None else self.client.adapters[adapter].adapter_id
        answers = [Answer([], None, [], [], 0) for _ in range(n)]
        async with self.client.generate(prompt=prompt, params=params, n=n, adapter_id=adapter_id) as generation:
            async for outputs in generation:
                for output in outputs:
                    answer = answers[output.choice]
                    answer.tokens += output.tokens
                    answer.logprobs += output.logprobs or []
                    answer.prompt_logprobs += output.prompt_logprobs or []
                    answer.cached_tokens += output.cached_tokens
                    answer.finish = output.finish or answer.finish
        return answers

    async def stats(self) -> Stats:
        return await self.client.stats()

    async def settled(self) -> None:
        """Until nothing runs and nothing is on its way; the brain's invariants hold then."""
        async with asyncio.timeout(30):
            while not self.engine.scheduler.idle:  # noqa: ASYNC110 - the loop has nobody to tell but tests
                await asyncio.sleep(0.005)
        self.engine.scheduler.check()
        await asyncio.to_thread(self.engine.worker._bank.settle)  # behind copies and merges under way


@contextlib.asynccontextmanager
async def local_engine(config: EngineConfig, *, poison: bool = True) -> AsyncIterator[LocalEngine]:
    """Starts an engine, checks at the end that it is idle with every invariant intact, and stops it.

    `poison`: chunks are filled with NaN as they become free, so that whoever still reads them gives itself away.
    """
    gateway_end, engine_end = memory_pair()
    engine = await build(config, engine_end)
    if poison:
        _poison_freed(engine)
    running = asyncio.create_task(_serve(engine, engine_end))
    client = await EngineClient.over(gateway_end)
    local = LocalEngine(engine, client)
    try:
        yield local
        await local.settled()
    finally:
        await client.close()
        await asyncio.gather(running, return_exceptions=True)
        engine.close()
        running.result()  # what the engine failed with says more than what its clients saw of it


def _poison_freed(engine: Engine) -> None:
    """A block's chunk at once, an adapter's when the worker is told that it left, which is before it is written again.

    Until then a stack of adapters may be built from it beside the steps, and taken by one that has none of its rows.
    """
    arena, told = engine.scheduler._arena, engine.loader.dropped
    changed, left = arena.set_use, list[int]()
    before: dict[int, ChunkUse] = {}

    def set_use(chunk: int, use: ChunkUse) -> None:
        before[chunk] = arena.use(chunk)
        changed(chunk, use)

    def on_free(chunk: int) -> None:
        if before[chunk] is ChunkUse.ADAPTER:
            left.append(chunk)
        else:
            engine.worker.poison((chunk,))

    def dropped(adapter_ids: Iterable[int]) -> None:
        told(adapter_ids)
        if left:
            engine.worker.poison(tuple(left))
            left.clear()

    arena.on_free, arena.set_use, engine.loader.dropped = on_free, set_use, dropped  # type: ignore[method-assign]


async def _serve(engine: Engine, link: EngineLink) -> None:
    """An engine that fails is gone for its clients, as in a process of its own."""
    try:
        await engine.run()
    finally:
        await link.close()

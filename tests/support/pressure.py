"""Hundreds of adapters under everything at once: drifting Zipf traffic, aborts, loads, unloads, swaps, pins, refusals.

Many tasks drive one engine through its client until the time is up and every kind of event was seen. What was served is
kept, so that it can be compared with what each adapter gives alone.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.client import EngineClient, Generation
from engine.models.dims import LORA_MODULES, ModelDims
from engine.types import EngineError, ErrorCode, FinishReason, SamplingParams
from tests.support.adapters import write_adapter
from tests.support.engine import Answer
from tests.support.models import EOS_TOKEN
from tests.support.watch import Watch

RANKS = (8, 8, 16, 8, 32)  # in turn
LENGTHS = (6, 40, 70)  # of prompts, in tokens
OUTPUTS = (3, 10, 50)
SKEW = 1.0  # of Zipf's law
DRIFT = 40  # requests after which the most popular adapter becomes the least
ABORT_SHARE = 0.1
BASE_CLIENTS = 4  # every so many, one asks the base alone, and for long answers
VERSIONS = 3  # an adapter's weights are replaced by the next of these
PINS = 7  # as many as eight slots allow
DRAIN_SECONDS = 120.0  # nothing that was accepted is to be ended
ADMINS = 3  # tasks that unload and load


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked; few different ones, so that many answers are compared with one given alone."""

    prompt: int  # index
    warm: bool  # sampled at a temperature; else greedy


QUESTIONS = (Question(0, False), Question(1, False), Question(1, True), Question(2, False))


@dataclass(frozen=True, slots=True)
class Served:
    """What one choice got. `adapter_id` says which load served it; None: the base."""

    adapter_id: int | None
    question: Question
    choice: int
    limit: int  # max_tokens
    to_the_end: bool  # end tokens are ignored
    tokens: tuple[int, ...]
    finish: FinishReason | None  # None: its client left, or it was ended by force

    def fits(self, alone: list[int]) -> bool:
        """Whether it is the start of `alone`, which goes on beyond end tokens, and ended where it had to."""
        return list(self.tokens) == alone[: len(self.tokens)] and self._ended_rightly()

    def _ended_rightly(self) -> bool:
        stops = () if self.to_the_end else (EOS_TOKEN,)
        if len(self.tokens) > self.limit or any(token in stops for token in self.tokens[:-1]):
            return False
        if self.tokens and self.tokens[-1] in stops:
            return self.finish is FinishReason.STOP
        return self.finish is (FinishReason.LENGTH if len(self.tokens) == self.limit else None)


def sampling(warm: bool, limit: int, *, to_the_end: bool) -> SamplingParams:
    """Greedy, or with a seed; the same for all, so that answers can be compared."""
    return SamplingParams(max_tokens=limit, seed=11, temperature=0.9 if warm else 0.0, ignore_eos=to_the_end)


class Fleet:
    """The adapters' folders, and which load came from which."""

    def __init__(self, folder: Path, dims: ModelDims, count: int) -> None:
        self.names = [f"a{index:03}" for index in range(count)]
        self.sources: dict[int, Path | None] = {}  # adapter_id -> folder
        self._folder = folder
        self._dims = dims
        self._versions = dict.fromkeys(self.names, 0)
        for name in self.names:
            self._write(name)

    def current(self, name: str) -> Path:
        return self._folder / f"{name}-{self._versions[name]}"

    def versions(self, name: str) -> set[int]:
        """adapter_ids of all loads so far; a request may still run on one that was swapped."""
        return {i for i, source in self.sources.items() if source is not None and source.name.startswith(f"{name}-")}

    async def renewed(self, name: str) -> Path:
        """Other weights for the name, in another folder."""
        self._versions[name] = (self._versions[name] + 1) % VERSIONS
        if not self.current(name).exists():
            await asyncio.to_thread(self._write, name)
        return self.current(name)

    def _write(self, name: str) -> None:
        index, version = self.names.index(name), self._versions[name]
        modules = LORA_MODULES if index % 3 else ("q_proj", "v_proj", "down_proj")
        write_adapter(
            self.current(name), self._dims, rank=RANKS[index % len(RANKS)], modules=modules,
            seed=1000 * version + index,
        )  # fmt: skip


@dataclass(slots=True)
class Pressure:
    """One run. `done` counts what its tasks did; an error that they did not ask for ends it."""

    client: EngineClient
    watch: Watch
    fleet: Fleet
    prompts: list[list[int]]
    seed: int = 0
    served: list[Served] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    on_request: Callable[[str], None] = lambda name: None  # told the adapter's name, '' for the base
    _asked: int = 0
    _over: bool = False
    _busy: set[str] = field(default_factory=set)  # an admin task is at it
    _closed: set[str] = field(default_factory=set)  # no new requests for it
    _forced: set[int] = field(default_factory=set)  # adapter_ids whose requests were to fail
    _stale: list[int] = field(default_factory=list)  # adapter_ids of loads that are gone

    async def run(self, clients: int, enough: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        """Until `enough` says so; what is open then ends as it must."""
        rngs = [random.Random(f"{self.seed} client {index}") for index in range(clients)]
        work = [self._client(rng, base=index % BASE_CLIENTS == 0) for index, rng in enumerate(rngs)]
        work += [self._admin(random.Random(f"{self.seed} admin {index}")) for index in range(ADMINS)]
        work += [self._pinner(random.Random(f"{self.seed} pins")), self._end_when(enough)]
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)

    async def _end_when(self, enough: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        while not await enough():  # noqa: ASYNC110 - nobody tells when the time is up
            await asyncio.sleep(0.4)
        self._over = True

    # Traffic

    async def _client(self, rng: random.Random, *, base: bool) -> None:
        weights = list(itertools.accumulate((rank + 1) ** -SKEW for rank in range(len(self.fleet.names))))
        while not self._over:
            self._asked += 1
            (rank,) = rng.choices(range(len(self.fleet.names)), cum_weights=weights)
            name = self.fleet.names[(rank + self._asked // DRIFT) % len(self.fleet.names)]
            if base or name in self._closed:
                name = ""
            await self._ask(name, rng, max(OUTPUTS) if base else rng.choice(OUTPUTS))

    async def _ask(self, name: str, rng: random.Random, limit: int) -> None:
        """One request, which a few clients abandon on the way."""
        adapter_id = self.client.adapters[name].adapter_id if name else None
        self.on_request(name)
        question, n, to_the_end = rng.choice(QUESTIONS), rng.choice((1, 1, 1, 2)), rng.random() < 0.5
        answers = [Answer([], None, [], [], 0) for _ in range(n)]
        stays = limit * n if rng.random() >= ABORT_SHARE else rng.randrange(limit)  # tokens that it waits for
        params = sampling(question.warm, limit, to_the_end=to_the_end)
        generation = self.client.generate(
            prompt=self.prompts[question.prompt], params=params, n=n, adapter_id=adapter_id
        )
        try:
            await self._read(generation, answers, stays)
        except EngineError as error:
            if error.code is not ErrorCode.ADAPTER_UNAVAILABLE or self._version(generation) not in self._forced:
                raise
            self.done["failed by force"] += 1
        self.served += [
            Served(self._version(generation), question, choice, limit, to_the_end, tuple(answer.tokens), answer.finish)
            for choice, answer in enumerate(answers)
        ]

    def _version(self, generation: Generation) -> int | None:
        """The load that serves it: a swap may have overtaken the request."""
        return self.watch.served_by[generation.request_id]

    async def _read(self, generation: Generation, answers: list[Answer], stays: int) -> None:
        async with generation:
            async for outputs in generation:
                for output in outputs:
                    answers[output.choice].tokens += output.tokens
                    answers[output.choice].finish = output.finish
                if any(answer.finish is None for answer in answers) and sum(len(a.tokens) for a in answers) > stays:
                    self.watch.client_leaves(generation.request_id)
                    self.done["abandoned"] += 1
                    return

    # Changes

    @asynccontextmanager
    async def _holding(self, rng: random.Random) -> AsyncIterator[str]:
        """An adapter that no other admin task touches."""
        name = rng.choice([name for name in self.fleet.names if name not in self._busy])
        self._busy.add(name)
        try:
            yield name
        finally:
            self._busy.discard(name)
            self._closed.discard(name)

    async def _admin(self, rng: random.Random) -> None:
        kinds = (self._reload, self._swap, self._swap, self._force, self._bad_load, self._use_stale)
        while not self._over:
            await rng.choice(kinds)(rng)
            await asyncio.sleep(rng.random() * 0.02)

    async def _reload(self, rng: random.Random) -> None:
        """Unloads, and loads other weights by the same name."""
        async with self._holding(rng) as name:
            self._closed.add(name)
            old = self.client.adapters[name].adapter_id
            await self.client.unload_adapter(name, timeout=DRAIN_SECONDS)
            self._stale.append(old)
            info = await self.client.load_adapter(name, str(await self.fleet.renewed(name)))
            assert info.adapter_id > old
            self.fleet.sources[info.adapter_id] = self.fleet.current(name)
            self.done["reloaded"] += 1

    async def _swap(self, rng: random.Random) -> None:
        """Other weights under requests that run; those end on the weights that they began with."""
        async with self._holding(rng) as name:
            old = self.client.adapters[name].adapter_id
            info = await self.client.load_adapter(name, str(await self.fleet.renewed(name)), inplace=True)
            assert info.adapter_id > old
            self.fleet.sources[info.adapter_id] = self.fleet.current(name)
            self.done["swapped"] += 1

    async def _force(self, rng: random.Random) -> None:
        """An unload that waits for nobody."""
        async with self._holding(rng) as name, asyncio.TaskGroup() as group:
            self._closed.add(name)
            old = self.client.adapters[name].adapter_id
            self._forced |= self.fleet.versions(name)
            for _ in range(rng.randrange(4)):
                group.create_task(self._ask(name, rng, max(OUTPUTS)))
            await asyncio.sleep(rng.random() * 0.2)
            await self.client.unload_adapter(name, force=True)
            self._stale.append(old)
            info = await self.client.load_adapter(name, str(self.fleet.current(name)))
            self.fleet.sources[info.adapter_id] = self.fleet.current(name)
            self.done["unloaded by force"] += 1

    async def _bad_load(self, rng: random.Random) -> None:
        await self._refused(ErrorCode.ADAPTER_INVALID, self.client.load_adapter("bad", "/nowhere/at/all"), "bad loads")

    async def _use_stale(self, rng: random.Random) -> None:
        """A request for a load that is gone is never served by what bears its name now."""
        if not self._stale:
            return

        async def ask() -> None:
            params = SamplingParams(max_tokens=2, seed=1)
            async with self.client.generate(prompt=[5], params=params, adapter_id=rng.choice(self._stale)) as answer:
                async for _ in answer:
                    raise AssertionError("a stale adapter_id was served")

        await self._refused(ErrorCode.ADAPTER_NOT_FOUND, ask(), "stale requests")

    async def _pinner(self, rng: random.Random) -> None:
        """Pins as many as may be, is refused one more, and lets them go again."""
        while not self._over:
            held, before = [], self.done["pinned"]
            async with asyncio.TaskGroup() as group:
                for _ in range(rng.choice((2, PINS))):
                    context = self._holding(rng)
                    held.append((context, await context.__aenter__()))
                    group.create_task(self._pin(held[-1][1]))
            if self.done["pinned"] - before == PINS:
                async with self._holding(rng) as name:
                    await self._refused(ErrorCode.INVALID_REQUEST, self.client.pin_adapter(name, True), "pins too many")
            await asyncio.sleep(rng.random() * 0.2)
            for context, name in held:
                assert not (await self.client.pin_adapter(name, False)).pinned
                self.done["unpinned"] += 1
                await context.__aexit__(None, None, None)
            await asyncio.sleep(rng.random() * 0.5)

    async def _pin(self, name: str) -> None:
        try:
            info = await self.client.pin_adapter(name, True)
        except EngineError as error:  # so many large ones leave too little of the arena
            if error.code is not ErrorCode.INVALID_REQUEST or "for one full context are more than" not in error.message:
                raise
            self.done["pins too large"] += 1
            return
        assert info.pinned
        assert info.state == "resident"
        self.done["pinned"] += 1

    async def _refused(self, code: ErrorCode, call: Coroutine[Any, Any, Any], kind: str) -> None:
        try:
            await call
        except EngineError as error:
            if error.code is not code:
                raise
            self.done[kind] += 1
        else:
            raise AssertionError(f"{kind}: not refused")

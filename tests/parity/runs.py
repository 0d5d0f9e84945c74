"""Sends a workload through a whole engine and keeps what came back beside the counters that tell what happened."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.messages import Stats
from tests.parity.judge import Ask, Judge
from tests.parity.reference import Reference
from tests.support.engine import Answer, LocalEngine, local_engine


@dataclass(slots=True)
class Run:
    """Everything that was asked of one engine."""

    asks: list[Ask] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    lora_steps: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, counter: str) -> int:
        return self.stats.counters.get(counter, 0)

    def judged(self, reference: Reference) -> Judge:
        judge = Judge(reference)
        judge.all_greedy(self.asks, self.answers)
        return judge


async def send(engine: LocalEngine, asks: Sequence[Ask], *, alone: bool = False) -> list[Answer]:
    """The first choice of each, all at once or one after the other."""
    if alone:
        return [(await engine.ask(ask.prompt, ask.params, adapter=ask.adapter))[0] for ask in asks]
    sent = (engine.ask(ask.prompt, ask.params, adapter=ask.adapter) for ask in asks)
    return [choices[0] for choices in await asyncio.gather(*sent)]


async def run(config: EngineConfig, *rounds: Sequence[Ask], alone: bool = False) -> Run:
    """Each round is sent when the one before has ended."""
    done = Run()
    async with local_engine(config) as engine:
        for asks in rounds:
            done.asks += asks
            done.answers += await send(engine, asks, alone=alone)
            await engine.settled()
        done.stats = await engine.stats()
        done.lora_steps = dict(engine.engine.worker.lora_steps)
    return done


def shuffled(asks: Sequence[Ask], seed: int = 0) -> list[Ask]:
    return random.Random(seed).sample(list(asks), len(asks))

"""After the soak's traffic: each checked answer against the same model's alone, some against another model's."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.soak_judge import Answer, Tally, compare
from benchmarks.soak_traffic import Checked, Traffic, greedy_body, load, unload

AT_ONCE = 4  # answers of one model that are compared together
CONTROLS = 100  # checked answers that are compared with another model's


@dataclass(slots=True)
class Comparison:
    """Every checked answer against the same model alone, and some against another model."""

    own: Tally = field(default_factory=Tally)
    control: Tally = field(default_factory=Tally)
    left_out: int = 0  # for want of time


async def compare_alone(http: httpx.AsyncClient, traffic: Traffic, seconds: float) -> Comparison:
    """Asks one model after the other, with nobody beside but itself, until the time is over."""
    end, found = time.monotonic() + seconds, Comparison()
    every = sorted(traffic.checked, key=lambda checked: checked.model)
    for model, group in itertools.groupby(every, key=lambda checked: checked.model):
        for some in batched(list(group), AT_ONCE):
            if time.monotonic() > end:
                found.left_out += len(some)
                continue
            await _compare(http, traffic, found, model, some)
    for number, checked in enumerate(every[:: max(1, len(every) // CONTROLS)]):
        if time.monotonic() < end or number == 0:
            other = traffic.base if checked.model != traffic.base else f"{traffic.base}:{min(traffic.sources)}"
            await _provide(http, traffic, other)
            found.control.add(compare(checked.answer, await _alone(http, other, checked)))
    return found


async def _compare(
    http: httpx.AsyncClient, traffic: Traffic, found: Comparison, model: str, some: Sequence[Checked]
) -> None:
    await _provide(http, traffic, model)
    answers = await asyncio.gather(*(_alone(http, model, checked) for checked in some))
    for checked, answer in zip(some, answers, strict=True):
        verdict = compare(checked.answer, answer)
        found.own.add(verdict)
        if verdict.wrong:
            traffic.errors.append(f"{model} answers otherwise alone: {verdict} for {checked.prompt!r}")


def batched(items: Sequence[Checked], size: int) -> list[Sequence[Checked]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


async def _provide(http: httpx.AsyncClient, traffic: Traffic, model: str) -> None:
    """Another one goes for it, so that no more are on the host than under load."""
    name = model.partition(":")[2]
    if name and name not in traffic.served:
        await unload(http, traffic, max(traffic.served))
        await load(http, traffic, name)


async def _alone(http: httpx.AsyncClient, model: str, checked: Checked) -> Answer:
    """A salt keeps it from reading what the loaded run left in the prefix cache."""
    body = greedy_body(model, checked.prompt, len(checked.answer.tokens)) | {"cache_salt": "alone"}
    return Answer.of((await http.post("/v1/completions", json=body)).raise_for_status().json())

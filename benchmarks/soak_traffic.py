"""The clients of the soak: streams, plain answers, seeded draws, clients that leave, and loads and unloads beside them.

What they share is `Traffic`; whatever was not asked for ends in its `errors`.
"""

import asyncio
import collections
import itertools
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

from benchmarks.soak_judge import Answer

CHECK_EVERY = 50
DRAIN_SECONDS = 100  # a slow machine may not end what was accepted within the usual time-out
SUBJECTS = ("A", "The", "Some", "Each", "That", "No", "My", "Every", "This")
KINDS = ("old", "green", "slow", "bright", "heavy", "quiet", "broken", "golden", "hungry", "clever", "frozen", "empty")
THINGS = ("river", "lamp", "bridge", "sailor", "garden", "letter", "engine", "teacher", "winter", "mountain", "market")
DOES = ("crosses", "repairs", "forgets", "paints", "sells", "follows", "opens", "carries", "watches", "answers")


@dataclass(frozen=True, slots=True)
class Checked:
    """A greedy answer given under load."""

    model: str
    prompt: str
    answer: Answer


@dataclass(slots=True)
class Traffic:
    """What the clients share. A name leaves `served` before it is unloaded, so that no new request may miss it."""

    base: str
    sources: Mapping[str, Path]
    served: set[str] = field(default_factory=set)
    unloads: collections.Counter[str] = field(default_factory=collections.Counter)  # begun, by name
    checked: list[Checked] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: list[str] = field(default_factory=list)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def model(self, draw: random.Random) -> str:
        names = sorted(self.served)
        return self.base if not names or draw.random() < 0.15 else f"{self.base}:{draw.choice(names)}"


def greedy_body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A request whose answer can be judged."""
    return {
        "model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "logprobs": 5,
    }  # fmt: skip


async def client_loop(http: httpx.AsyncClient, traffic: Traffic, seed: int, until: float) -> None:
    """One client: one request after the other."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        number = next(traffic.numbers)
        body = _body(traffic, draw, number)
        try:
            await _send(http, traffic, body, draw, checked=number % CHECK_EVERY == 0)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            traffic.errors.append(f"{type(error).__name__}: {error} for {body}")


def _body(traffic: Traffic, draw: random.Random, number: int) -> dict[str, Any]:
    prompt, tokens = _prompt(draw), draw.randint(8, 64)
    if number % CHECK_EVERY == 0:
        return greedy_body(traffic.model(draw), prompt, tokens)
    body: dict[str, Any] = {
        "model": traffic.model(draw), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
        "stream": number % 2 == 0,
    }  # fmt: skip
    if number % 3 == 0:
        body |= {"temperature": 0.8, "top_p": 0.9, "seed": number, "frequency_penalty": 0.2}
    return body


def _prompt(draw: random.Random) -> str:
    def sentence() -> str:
        words = (draw.choice(some) for some in (SUBJECTS, KINDS, THINGS, DOES, KINDS, THINGS))
        return "{} {} {} {} the {} {}.".format(*words)

    return " ".join(sentence() for _ in range(draw.randint(1, 20)))


async def _send(
    http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], draw: random.Random, *, checked: bool
) -> None:
    name = body["model"].partition(":")[2]
    unloads = traffic.unloads[name]
    if body.get("stream"):
        refused = await _stream(http, traffic, body, leave=draw.random() < 0.1)
    else:
        refused = await _ask(http, traffic, body, checked=checked)
    if refused is None:
        return
    status, text = refused
    if status == 404 and traffic.unloads[name] > unloads:  # it left while the request was on its way
        traffic.counts["refused, as asked"] += 1
    else:
        traffic.errors.append(f"{status}: {text[:200]} for {body['model']}")


async def _ask(
    http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], *, checked: bool
) -> tuple[int, str] | None:
    """(status, text) of a refusal."""
    response = await http.post("/v1/completions", json=body)
    if response.status_code != 200:
        return response.status_code, response.text
    answer = response.json()
    traffic.counts["answers"] += 1
    if (tokens := answer["usage"]["completion_tokens"]) != body["max_tokens"]:
        traffic.errors.append(f"asked for {body['max_tokens']} tokens, got {tokens}")
    elif checked:
        traffic.checked.append(Checked(body["model"], body["prompt"], Answer.of(answer)))
    return None


async def _stream(
    http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], *, leave: bool
) -> tuple[int, str] | None:
    """(status, text) of a refusal."""
    events, ended = 0, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return response.status_code, (await response.aread()).decode()
        async for line in _lines(response):
            if line.startswith(b"data: {"):
                if (error := orjson.loads(line[6:]).get("error")) is not None:
                    raise ValueError(f"in a stream: {error}")
                events += 1
            ended |= line == b"data: [DONE]"
            if leave and events > 3:
                traffic.counts["left"] += 1
                return None
    if not ended:
        raise ValueError("a stream broke off")
    traffic.counts["streams"] += 1
    return None


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """As events are cut: httpx's own lines also end at separators within a text."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line


async def churn(http: httpx.AsyncClient, traffic: Traffic, keep: int, until: float) -> None:
    """Loads and unloads, one after the other, so that about `keep` adapters are served."""
    draw = random.Random(1)
    while time.monotonic() < until:
        if len(traffic.served) > keep:
            await unload(http, traffic, draw.choice(sorted(traffic.served)))
        else:
            await load(http, traffic, draw.choice(sorted(set(traffic.sources) - traffic.served)))
        await asyncio.sleep(0.05)


async def load(http: httpx.AsyncClient, traffic: Traffic, name: str) -> None:
    body = {"lora_name": name, "lora_path": str(traffic.sources[name])}
    if await _admin(http, traffic, "load", body):
        traffic.served.add(name)


async def unload(http: httpx.AsyncClient, traffic: Traffic, name: str) -> None:
    traffic.served.discard(name)
    traffic.unloads[name] += 1
    await _admin(http, traffic, "unload", {"lora_name": name, "timeout": DRAIN_SECONDS})


async def _admin(http: httpx.AsyncClient, traffic: Traffic, what: str, body: dict[str, Any]) -> bool:
    response = await http.post(f"/{what}_lora_adapter", json=body)
    if response.status_code != 200:
        traffic.errors.append(f"{what} {body}: {response.status_code} {response.text[:200]}")
    traffic.counts[f"{what}s"] += response.status_code == 200
    return response.status_code == 200

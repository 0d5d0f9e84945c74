"""Loads, unloads, pins and requests in a random order from many clients at once: nothing but the expected answers.

Greedy answers are compared with those of the same adapter alone: stale KV or a mixed-up slot would show.
"""

import asyncio
import collections
import json
import random
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import Server, client_of, figures, generate, load, names_of, serving, unload, until
from tests.support.adapters import write_adapter

NAMES = [f"a{i}" for i in range(6)]
PROMPTS = [f"{'tell me ' * count}of it" for count in (1, 5, 20, 60)]
TOKENS = 24
WORKERS = 12
Expected = dict[tuple[str, bool], set[str]]  # (prompt, with an adapter) -> the texts that may be answered
ALLOWED = {
    "load": {200, 400, 404, 503},  # a name taken, too many pins; unloaded while it waited; no room
    "unload": {200, 404},
    "pin": {200, 400, 404, 503},
    "unpin": {200, 404},
    "complete": {200, 404, 503},
    "stream": {200, 404, 503},
    "native": {200, 400, 404, 503},
}


class Worker:
    """One client that does one thing after the other."""

    def __init__(self, client: httpx.AsyncClient, sources: list[Path], expected: Expected, seed: int) -> None:
        self.seen: collections.Counter[tuple[str, int]] = collections.Counter()
        self._client = client
        self._sources = sources
        self._expected = expected
        self._draw = random.Random(seed)

    async def run(self, rounds: int) -> None:
        for _ in range(rounds):
            kind = self._draw.choice(["load", "load", "unload", "pin", "unpin", *["complete", "stream", "native"] * 4])
            if self._draw.random() < 0.15:
                await self._abandon(kind)
            else:
                await self._do(kind)

    async def _abandon(self, kind: str) -> None:
        task = asyncio.create_task(self._do(kind))
        await asyncio.wait({task}, timeout=self._draw.random() / 20)
        task.cancel()
        results = await asyncio.gather(task, return_exceptions=True)
        assert not isinstance(results[0], AssertionError), results[0]

    async def _do(self, kind: str) -> None:
        response = await self._send(kind)
        self.seen[kind, response.status_code] += 1
        assert response.status_code in ALLOWED[kind], f"{kind}: {response.status_code} {response.text[:500]}"
        if kind == "complete" and response.status_code == 200:
            self._check(response)
        if kind == "stream" and response.status_code == 200:
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text or "was unloaded" in response.text, response.text[-500:]

    async def _send(self, kind: str) -> httpx.Response:
        name = self._draw.choice(NAMES)
        match kind:
            case "load":
                source = str(self._draw.choice(self._sources))
                body = {"lora_name": name, "lora_path": source, "pinned": self._draw.random() < 0.2}
                return await self._client.post("/load_lora_adapter", json=body)
            case "unload" | "pin" | "unpin":
                return await self._client.post(f"/{kind}_lora_adapter", json={"lora_name": name})
            case "native":
                count = self._draw.randint(1, 4)
                paths = [self._draw.choice([None, *NAMES]) for _ in range(count)]
                sampling = {"max_new_tokens": self._draw.randint(1, 40)}
                body = {"text": ["hello"] * count, "lora_path": paths, "sampling_params": sampling}
                return await self._client.post("/generate", json=body)
            case _:
                return await self._client.post("/v1/completions", json=self._completion(name, kind == "stream"))

    def _check(self, response: httpx.Response) -> None:
        asked = json.loads(response.request.content)
        wanted = self._expected[asked["prompt"], asked["model"] != "llama"]
        for choice in response.json()["choices"]:
            assert choice["text"] in wanted, asked

    def _completion(self, name: str, stream: bool) -> dict[str, object]:
        return {
            "model": self._draw.choice(["llama", f"llama:{name}", f"llama:{name}"]),
            "prompt": self._draw.choice(PROMPTS),
            "max_tokens": TOKENS,
            "temperature": 0,
            "n": self._draw.choice([1, 1, 1, 3]),
            "stream": stream,
        }


async def answers_alone(client: httpx.AsyncClient, sources: list[Path]) -> Expected:
    """What the base and each source answer with nobody else there."""
    expected: Expected = collections.defaultdict(set)
    for source in (None, *sources):
        if source is not None:
            await load(client, "alone", source)
        for prompt in PROMPTS:
            expected[prompt, source is not None].add(await generate(client, prompt, source and "alone", TOKENS))
        if source is not None:
            await unload(client, "alone")
    return expected


@pytest.mark.parametrize("rounds", [8, pytest.param(120, marks=pytest.mark.slow)])
async def test_churn(files: Files, tmp_path: Path, rounds: int) -> None:
    """Three slots and four loaded adapters at most, in an arena that does not hold all that is asked at once."""
    sources = [write_adapter(tmp_path / f"s{i}", files.model, rank=8 * 2**i, seed=i) for i in range(4)]
    flags = ("--enable-lora", "--max-loras-per-batch", "3", "--max-loaded-loras", "4", "--max-lora-rank", "64")
    memory = ("--max-total-tokens", "4096", "--context-length", "1024")
    with serving(tmp_path / "log", *files.flags, *flags, *memory) as server:
        async with client_of(server) as client:
            expected = await answers_alone(client, sources)
            assert not any(expected[prompt, True] & expected[prompt, False] for prompt in PROMPTS)
            workers = [Worker(client, sources, expected, seed) for seed in range(WORKERS)]
            async with asyncio.timeout(60 + rounds):
                await asyncio.gather(*(worker.run(rounds) for worker in workers))
            await at_rest(client, server)
            assert (await figures(client))("preemptions_total") + (await figures(client))(
                "mixed_adapter_steps_total"
            ) > 0
            seen = sum((worker.seen for worker in workers), collections.Counter[tuple[str, int]]())
            assert {kind for kind, status in seen if status == 200} >= {
                "load",
                "unload",
                "complete",
                "stream",
                "native",
            }


async def at_rest(client: httpx.AsyncClient, server: Server) -> None:
    """Everything that is left can be unloaded, and then all of the arena is free or cached."""
    for name in names_of((await client.get("/v1/models")).json()["data"])[1:]:
        body = {"lora_name": name.partition(":")[2]}
        assert (await client.post("/unload_lora_adapter", json=body)).status_code == 200
    told = await until(client, lambda told: told("chunks", use="kv") + told("requests_running") == 0, 10)
    assert told("chunks", use="adapter") == told("slots_used") == told("slots_pinned") == 0
    assert told("requests_waiting") == 0
    assert (await figures(client))("engine_losses_total") == 0
    assert "Traceback" not in server.text()

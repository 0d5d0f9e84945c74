"""A long run of mixed traffic over adapters that come and go: no error that was not asked for, nothing left behind.

    python -m benchmarks.soak [--minutes 7] [--adapters 100] [--slots 8] [--model-path FOLDER]

Streams, plain answers, seeded draws and clients that leave, over base and adapters, while adapters are loaded and
unloaded. Every 50th answer is greedy and is compared with the same adapter's answer alone, after the traffic.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import Server, loramux
from benchmarks.report import Report
from engine.models.registry import load_config
from engine.models.source import resolve_model
from tests.support.adapters import write_adapter

RANKS = (4, 8, 16, 32, 64)
MODULES = (
    ("q_proj", "v_proj"),
    ("down_proj",),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
CHECK_EVERY = 50
NEAR = 0.15  # nats between the two best tokens; below it bf16 batches of other shapes may differ
SETTLE_SECONDS = 30.0
WORDS = ("river", "lamp", "seven", "green", "copper", "walks", "slowly", "under", "the", "old", "bridge", "asks")


@dataclass(frozen=True, slots=True)
class Checked:
    """A greedy answer given under load."""

    model: str
    prompt: str
    tokens: int
    chosen: list[str]
    tops: list[dict[str, float]]


@dataclass(slots=True)
class Traffic:
    """What the clients share. A name leaves `served` before it is unloaded, so that no new request may miss it."""

    base: str
    sources: Mapping[str, Path]
    served: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    checked: list[Checked] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: list[str] = field(default_factory=list)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def model(self, draw: random.Random) -> str:
        names = sorted(self.served)
        return self.base if not names or draw.random() < 0.15 else f"{self.base}:{draw.choice(names)}"


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
    body: dict[str, Any] = {
        "model": traffic.model(draw),
        "prompt": " ".join(draw.choices(WORDS, k=draw.randint(3, 150))),
        "max_tokens": draw.randint(8, 64),
        "ignore_eos": True,
    }
    if number % CHECK_EVERY == 0:
        return {**body, "temperature": 0, "logprobs": 2}
    if number % 3 == 0:
        body |= {"temperature": 0.8, "top_p": 0.9, "seed": number, "frequency_penalty": 0.2}
    return {**body, "stream": number % 2 == 0}


async def _send(
    http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], draw: random.Random, *, checked: bool
) -> None:
    name = body["model"].partition(":")[2]
    if body.get("stream"):
        await _stream(http, traffic, body, leave=draw.random() < 0.1)
        return
    response = await http.post("/v1/completions", json=body)
    if response.status_code != 200:
        _refused(traffic, name, response.status_code, response.text)
        return
    answer = response.json()
    _count(traffic, body, answer["usage"]["completion_tokens"])
    if checked:
        traffic.checked.append(_checked(body, answer))


async def _stream(http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], *, leave: bool) -> None:
    events = 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            _refused(traffic, body["model"].partition(":")[2], response.status_code, text)
            return
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if (error := orjson.loads(line[6:]).get("error")) is not None:
                    raise ValueError(f"in a stream: {error}")
                events += 1
            if leave and events > 3:
                traffic.counts["left"] += 1
                return
    traffic.counts["streams"] += 1


def _count(traffic: Traffic, body: dict[str, Any], tokens: int) -> None:
    traffic.counts["answers"] += 1
    if tokens != body["max_tokens"]:
        traffic.errors.append(f"asked for {body['max_tokens']} tokens, got {tokens}")


def _refused(traffic: Traffic, name: str, status: int, text: str) -> None:
    """A name that leaves while the request is on its way is the one refusal that was asked for."""
    if status == 404 and name not in traffic.served:
        traffic.counts["refused, as asked"] += 1
    else:
        traffic.errors.append(f"{status}: {text[:200]}")


def _checked(body: dict[str, Any], answer: dict[str, Any]) -> Checked:
    logprobs = answer["choices"][0]["logprobs"]
    return Checked(body["model"], body["prompt"], body["max_tokens"], logprobs["tokens"], logprobs["top_logprobs"])


async def churn(http: httpx.AsyncClient, traffic: Traffic, keep: int, until: float) -> None:
    """Loads and unloads, one after the other, so that about `keep` adapters are served."""
    draw = random.Random(1)
    while time.monotonic() < until:
        if len(traffic.served) > keep:
            name = draw.choice(sorted(traffic.served))
            traffic.served.discard(name)
            await _admin(http, traffic, "unload", {"lora_name": name})
        else:
            name = draw.choice(sorted(set(traffic.sources) - traffic.served))
            await load(http, traffic, name)
        await asyncio.sleep(0.05)


async def load(http: httpx.AsyncClient, traffic: Traffic, name: str) -> None:
    body = {"lora_name": name, "lora_path": str(traffic.sources[name])}
    if await _admin(http, traffic, "load", body):
        traffic.served.add(name)


async def _admin(http: httpx.AsyncClient, traffic: Traffic, what: str, body: dict[str, str]) -> bool:
    response = await http.post(f"/{what}_lora_adapter", json=body)
    if response.status_code != 200:
        traffic.errors.append(f"{what} {body}: {response.status_code} {response.text[:200]}")
    traffic.counts[f"{what}s"] += response.status_code == 200
    return response.status_code == 200


async def compare_alone(http: httpx.AsyncClient, traffic: Traffic) -> None:
    """Asks again with nobody beside; tokens agree up to where the two best were closer than NEAR."""
    for checked in traffic.checked:
        name = checked.model.partition(":")[2]
        if name and name not in traffic.served:
            await load(http, traffic, name)
        body = {
            "model": checked.model, "prompt": checked.prompt, "max_tokens": checked.tokens, "temperature": 0,
            "logprobs": 2, "ignore_eos": True,
        }  # fmt: skip
        alone = _checked(body, (await http.post("/v1/completions", json=body)).raise_for_status().json())
        _compare(traffic, checked, alone)


def _compare(traffic: Traffic, loaded: Checked, alone: Checked) -> None:
    traffic.counts["compared"] += 1
    for place, (one, other) in enumerate(zip(loaded.chosen, alone.chosen, strict=True)):
        if one == other:
            continue
        best = sorted(alone.tops[place].values(), reverse=True)
        if best[0] - best[1] > NEAR:
            traffic.errors.append(f"{loaded.model} answers otherwise alone at token {place}: {one!r}, {other!r}")
        else:
            traffic.counts["parted at a near tie"] += 1
        return


async def figures(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics that must be at rest when nobody asks."""
    text = (await http.get("/metrics")).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for label, value in sample.labels.items() if label in ("use", "tier")]
            found[",".join([sample.name, *labels])] = sample.value
    return found


async def at_rest(http: httpx.AsyncClient, traffic: Traffic) -> None:
    """Unloads everything and waits until the arena holds nothing but cached prefixes."""
    for name in sorted(traffic.served):
        await _admin(http, traffic, "unload", {"lora_name": name})
    traffic.served.clear()
    end, left = time.monotonic() + SETTLE_SECONDS, ["?"]
    while left and time.monotonic() < end:
        await asyncio.sleep(0.5)
        now = await figures(http)
        busy = ("loramux_requests_running", "loramux_requests_waiting", "loramux_slots_used", "loramux_chunks,kv",
                "loramux_chunks,adapter", "loramux_adapters_resident")  # fmt: skip
        left = [f"{name} {now[name]}" for name in busy if now.get(name)]
    if left:
        traffic.errors.append(f"left behind: {left}")


def write_adapters(folder: Path, model: Path, count: int) -> dict[str, Path]:
    dims = load_config(model).dims
    return {
        f"soak{i}": write_adapter(
            folder / f"soak{i}", dims, rank=RANKS[i % len(RANKS)], modules=MODULES[i % len(MODULES)], seed=i, std=0.02
        )
        for i in range(count)
    }


async def soak(server: Server, traffic: Traffic, arguments: argparse.Namespace, report: Report) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=120, limits=limits) as http:
        for name in itertools.islice(traffic.sources, arguments.adapters // 2):
            await load(http, traffic, name)
        seconds = arguments.minutes * 60
        until = time.monotonic() + seconds
        clients = [client_loop(http, traffic, seed, until) for seed in range(arguments.clients)]
        warm = asyncio.create_task(_warm(seconds))
        await asyncio.gather(churn(http, traffic, arguments.adapters // 2, until), *clients)
        before = await warm
        await compare_alone(http, traffic)
        await at_rest(http, traffic)
        after, metrics = _process(), await figures(http)
    for name, count in sorted(traffic.counts.items()):
        report.add(f"soak: {name}", "times", [count])
    for name in ("loramux_evictions_total,arena", "loramux_preemptions_total", "loramux_generated_tokens_total"):
        if name in metrics:
            report.add(f"soak: {name}", "times", [metrics[name]])
    report.add("soak: open files of gateway and engine, after less before", "files", [after[0] - before[0]])
    report.add("soak: memory of gateway and engine, after less before", "MB", [(after[1] - before[1]) / 1e6])
    report.add("soak: errors", "times", [len(traffic.errors)], "= 0")


async def _warm(seconds: float) -> tuple[int, int]:
    """The processes when a fifth of the time is over: what is allocated once is there by then."""
    await asyncio.sleep(seconds / 5)
    return _process()


def _process() -> tuple[int, int]:
    """(open files, resident bytes) of the server's processes."""
    processes = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
    files, memory = 0, 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            files += process.num_fds()
            memory += process.memory_info().rss
    return files, memory


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model-path", help="default: the demo")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    report = Report("soak", arguments.commit)
    model = resolve_model(arguments.model_path, None)
    with tempfile.TemporaryDirectory() as folder:
        traffic = Traffic("llama", write_adapters(Path(folder), model, arguments.adapters))
        flags = ["--model-path", str(model), "--served-model-name", "llama", "--enable-lora"]
        flags += ["--max-loras-per-batch", str(arguments.slots), "--max-lora-rank", str(max(RANKS))]
        async with loramux(*flags, threads=arguments.threads) as server:
            await soak(server, traffic, arguments, report)
    for error in traffic.errors[:20]:
        print(error, file=sys.stderr)
    report.save(arguments.folder)
    return 1 if traffic.errors else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

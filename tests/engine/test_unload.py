"""Unloads on a real engine: bytes freed on every tier, no old KV under a new load, an end in time whatever happens."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.types import EngineError, ErrorCode, SamplingParams
from tests.support.adapters import write_adapter
from tests.support.engine import LocalEngine, local_engine
from tests.support.models import write_model

SOURCES = 3
PROMPTS = [list(range(5, 5 + count)) for count in (3, 20, 40)]
SLACK = 5.0  # seconds beyond the time-out: the steps that are on their way, on a busy machine


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalEngine]:
    """Three slots, chunks that are filled with NaN as they become free, sources `s0` to `s2`."""
    model = write_model(tmp_path / "model")
    for index in range(SOURCES):
        write_adapter(tmp_path / f"s{index}", model, rank=8 * (index + 1), seed=index, std=0.4)
    config = EngineConfig(
        model_path=str(model), device="cpu", dtype="float32", enable_lora=True, max_loras_per_batch=3,
        max_lora_rank=32, context_length=256, max_total_tokens=4096, max_running_requests=8, threads=1,
    )  # fmt: skip
    async with local_engine(config) as engine:
        yield engine


def source(tmp_path: Path, index: int) -> str:
    return str(tmp_path / f"s{index % SOURCES}")


async def outputs(local: LocalEngine) -> list[list[int]]:
    return [(await local.ask(prompt, greedy(8), adapter="a"))[0].tokens for prompt in PROMPTS]


async def assert_gone(local: LocalEngine) -> None:
    stats = await local.stats()
    assert stats.chunks["adapter"] == stats.resident == stats.slots_pinned == 0
    assert stats.tier_bytes == {"arena": 0, "host": 0}
    assert local.engine.host.bytes_used == 0
    assert [adapter.name for adapter in stats.adapters] == [""]
    assert local.client.adapters == {}


@pytest.mark.parametrize("pinned", [False, True])
async def test_an_unload_frees_every_tier_at_once(local: LocalEngine, tmp_path: Path, pinned: bool) -> None:
    await local.client.load_adapter("a", source(tmp_path, 0), pinned=pinned)
    await outputs(local)
    before = await local.stats()
    assert before.tier_bytes["arena"] > 0
    assert before.tier_bytes["host"] > 0
    await local.client.unload_adapter("a")
    await assert_gone(local)


@pytest.mark.parametrize("inplace", [False, True])
async def test_other_weights_under_the_same_name_never_meet_old_kv(
    local: LocalEngine, tmp_path: Path, inplace: bool
) -> None:
    """Loaded alone, under names of their own, the sources say what each must answer."""
    expected = []
    for index in range(SOURCES):
        await local.client.load_adapter("a", source(tmp_path, index))
        expected.append(await outputs(local))
        await local.client.unload_adapter("a")
    assert len({str(answer) for answer in expected}) == SOURCES, "the weights tell themselves apart"
    hits = (await local.stats()).counters["prefix_hit_tokens"]
    for index in range(2 * SOURCES):
        await local.client.load_adapter("a", source(tmp_path, index), inplace=inplace)
        for _ in range(2):
            assert await outputs(local) == expected[index % SOURCES]
        now = (await local.stats()).counters["prefix_hit_tokens"]
        assert now > hits, "its own blocks are met"
        hits = now
        if not inplace:
            await local.client.unload_adapter("a")
    if inplace:
        assert (await local.stats()).counters["adapters_replaced"] == 2 * SOURCES - 1
        await local.client.unload_adapter("a")
    await assert_gone(local)


async def test_sequences_that_run_end_on_the_weights_they_began_with(local: LocalEngine, tmp_path: Path) -> None:
    alone = []
    for index in range(2):
        await local.client.load_adapter("a", source(tmp_path, index))
        alone.append((await local.ask(PROMPTS[1], greedy(120), adapter="a"))[0].tokens)
        await local.client.unload_adapter("a")
    await local.client.load_adapter("a", source(tmp_path, 0))
    old = [asyncio.create_task(local.ask(PROMPTS[1], greedy(120), adapter="a")) for _ in range(12)]  # four must wait
    async with asyncio.timeout(30):
        while (await local.stats()).running < 8:  # noqa: ASYNC110 - steps tell by their figures alone
            await asyncio.sleep(0)
    await local.client.load_adapter("a", source(tmp_path, 1), inplace=True)
    assert not all(task.done() for task in old)
    new = [asyncio.create_task(local.ask(PROMPTS[1], greedy(120), adapter="a")) for _ in range(4)]
    assert [(await task)[0].tokens for task in old] == [alone[0]] * 12
    assert [(await task)[0].tokens for task in new] == [alone[1]] * 4
    await local.settled()
    await local.client.unload_adapter("a")
    await assert_gone(local)


async def _client(local: LocalEngine, draw: random.Random) -> str:
    """One request of the adapter that is left, ends or fails; how."""
    adapter = local.client.adapters.get("a")
    if adapter is None:
        return "gone"
    leaves = draw.random() < 0.4
    prompt, params = draw.choice(PROMPTS), greedy(draw.choice([4, 30, 200]))
    generation = local.client.generate(
        prompt=prompt, params=params, n=draw.choice([1, 1, 3]), adapter_id=adapter.adapter_id
    )
    try:
        async with generation:
            async for _ in generation:
                if leaves and draw.random() < 0.5:
                    return "left"
    except EngineError as error:
        return error.code.value
    return "ended"


async def _trial(local: LocalEngine, tmp_path: Path, seed: int) -> list[str]:
    """Traffic with random aborts, perhaps a load in place, and an unload that ends in time; how the requests ended."""
    draw = random.Random(seed)
    await local.client.load_adapter("a", source(tmp_path, seed), pinned=draw.random() < 0.3)
    clients = [asyncio.create_task(_client(local, draw)) for _ in range(12)]
    others = [asyncio.create_task(local.ask(PROMPTS[0], greedy(20))) for _ in range(2)]
    for _ in range(draw.randrange(4)):
        await local.stats()
    if draw.random() < 0.4:
        await local.client.load_adapter("a", source(tmp_path, seed + 1), inplace=True)
        clients += [asyncio.create_task(_client(local, draw)) for _ in range(4)]
    timeout, force = draw.choice([0.0, 0.05, 5.0]), draw.random() < 0.3
    async with asyncio.timeout(timeout + SLACK):
        await local.client.unload_adapter("a", timeout=timeout, force=force)
    await assert_gone(local)
    ended = await asyncio.gather(*clients)
    assert [len(answer[0].tokens) for answer in await asyncio.gather(*others)] == [20, 20]
    await local.settled()
    return ended


@pytest.mark.parametrize("trials", [10, pytest.param(100, marks=pytest.mark.slow)])
async def test_an_unload_under_traffic_ends_in_time(local: LocalEngine, tmp_path: Path, trials: int) -> None:
    seen = [end for seed in range(trials) for end in await _trial(local, tmp_path, seed)]
    assert {"left", "ended", ErrorCode.ADAPTER_UNAVAILABLE.value} <= set(seen)
    assert set(seen) <= {
        "left",
        "ended",
        "gone",
        ErrorCode.ADAPTER_UNAVAILABLE.value,
        ErrorCode.ADAPTER_NOT_FOUND.value,
    }
    assert (await local.stats()).counters["drains"] == trials

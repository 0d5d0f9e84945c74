"""Parity of a tiny model of odd shape with adapters of every kind, in each way that the engine may take.

Each test asserts from counters that what it is about happened.
"""

import asyncio
import time

import pytest

from engine.models.dims import LORA_MODULES
from engine.plan import StepPlan
from tests.parity.judge import Ask
from tests.parity.runs import Run, run, send, shuffled
from tests.parity.zoo import ADAPTERS, SHAPES, Zoo, asks, make_zoo, prompts
from tests.support.engine import LocalEngine, local_engine

EVERYONE = (None, *ADAPTERS)
SMALL = ("one", "five", "first-layer")  # adapters that leave a small arena room for sequences


def check(done: Run, zoo: Zoo) -> None:
    done.judged(zoo.reference).verdict()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "gqa3"])
async def test_odd_shapes(shape: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    zoo = make_zoo(tmp_path_factory.mktemp(shape), shape)
    check(await run(zoo.config(), asks(16, EVERYONE, prompt_logprobs=2)), zoo)


@pytest.mark.parametrize("lora_stack", [True, False])
async def test_alone(zoo: Zoo, lora_stack: bool) -> None:
    work = asks(8, EVERYONE, prompt_logprobs=2)
    # Twice each: the stack that the first asks for is there when the second comes.
    done = await run(zoo.config(lora_stack=lora_stack), *([ask] for ask in work for _ in range(2)))
    check(done, zoo)
    assert done["mixed_adapter_steps"] == 0
    assert (done.lora_steps["stacked"] > 0) == lora_stack


@pytest.mark.parametrize("lora_stack", [True, False])
async def test_mixed(zoo: Zoo, lora_stack: bool) -> None:
    """From the second round on all adapters are resident and in the batch for many steps; the third has a stack."""
    work = asks(16, EVERYONE, max_tokens=16)
    done = await run(zoo.config(lora_stack=lora_stack), work, shuffled(work), work)
    check(done, zoo)
    assert done["mixed_adapter_steps"] > 20
    assert done["mixed_steps"] > 0
    assert done["prefix_hit_tokens"] > 0
    assert (done.lora_steps["stacked"] > 0) == lora_stack
    assert done.lora_steps["segmented"] > 0


async def test_base_alone_with_adapters_loaded(zoo: Zoo) -> None:
    done = await run(zoo.config(), asks(8, [None]))
    check(done, zoo)
    assert done.lora_steps["stacked"] == done.lora_steps["segmented"] == 0
    assert done.lora_steps["base"] > 0


@pytest.mark.parametrize("disable", [False, True])
async def test_prefix_cache(zoo: Zoo, disable: bool) -> None:
    """The same prompts for everyone, again and again: each owner meets its own blocks and nobody else's."""
    shared = prompts(1, 40, 40, seed=7)[0]
    work = [Ask(shared + ask.prompt, ask.adapter, ask.params) for ask in asks(8, EVERYONE, most=30)]
    done = await run(zoo.config(disable_radix_cache=disable), work, shuffled(work), work, alone=True)
    check(done, zoo)
    assert (done["prefix_hit_tokens"] > 0) == (not disable)
    if not disable:
        hits = [answer.cached_tokens for answer in done.answers]
        assert hits[: len(work)] == [0] * len(work), "an owner met another's blocks"
        assert all(hit >= 32 for hit in hits[len(work) :])


async def test_one_prompt_for_everyone(zoo: Zoo) -> None:
    """Whole prompts in common, all at once, with the base's blocks in the cache before."""
    prompt = prompts(1, 64, 64, seed=8)[0]
    work = [Ask(prompt, name, asks(1, EVERYONE)[0].params) for name in EVERYONE]
    done = await run(zoo.config(), work[:1], work, work)
    check(done, zoo)
    assert done["prefix_hit_tokens"] == 48 * (1 + len(work)), "three full blocks before the last token, from round two"


@pytest.mark.parametrize(("chunk", "cut"), [(24, True), (7, True), (-1, False)])
async def test_chunked_prefill(zoo: Zoo, chunk: int, cut: bool) -> None:
    work = asks(16, EVERYONE, least=10, most=150, prompt_logprobs=0)
    done = await run(zoo.config(chunked_prefill_size=chunk, max_running_requests=12), work)
    check(done, zoo)
    assert (done["prompt_chunks"] > 20) == cut
    assert done["mixed_steps"] > 0


@pytest.mark.parametrize("disable", [False, True])
async def test_one_step_ahead(zoo: Zoo, disable: bool) -> None:
    """In steady decode the next step is planned while the one before still runs."""
    warm, work = asks(8, EVERYONE), asks(8, EVERYONE, max_tokens=80, most=20, seed=1)
    async with local_engine(zoo.config(disable_overlap_schedule=disable)) as engine:
        await send(engine, warm)
        before = (await engine.stats()).counters
        _as_slow_as_a_real_model(engine)
        done = Run(work, await send(engine, work), await engine.stats())
    check(done, zoo)
    steps = done["steps"] - before["steps"]
    ahead = done["steps_planned_ahead"] - before["steps_planned_ahead"]
    assert steps >= 80
    assert ahead == 0 if disable else ahead >= 0.95 * steps


def _as_slow_as_a_real_model(engine: LocalEngine, seconds: float = 0.02) -> None:
    """A tiny model's step ends before a busy machine has let the loop plan at all."""
    worker, forward = engine.engine.worker, engine.engine.worker.forward

    def slow(plan: StepPlan) -> None:
        forward(plan)
        time.sleep(seconds)

    worker.forward = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("overlap", [True, False])
async def test_preemption(zoo: Zoo, overlap: bool) -> None:
    """Sequences outgrow the arena; those that give way compute their own tokens again."""
    config = zoo.config(
        SMALL, context_length=112, max_total_tokens=420, chunked_prefill_size=40, disable_overlap_schedule=not overlap
    )
    done = await run(config, asks(14, [None, *SMALL], least=5, most=30, max_tokens=64, prompt_logprobs=0))
    check(done, zoo)
    assert done["preemptions"] > 2
    assert done["resumptions"] > 2


async def test_more_adapters_than_slots(zoo: Zoo) -> None:
    work = asks(16, EVERYONE)
    done = await run(zoo.config(max_loras_per_batch=2), work, shuffled(work))
    check(done, zoo)
    assert done["skips_no_slot"] > 0
    assert done.stats.slots_total == 2
    assert done["mixed_adapter_steps"] > 0


async def test_more_adapters_than_arena(zoo: Zoo) -> None:
    """The arena holds the largest adapter and one context: adapters take turns, and come back to other chunks."""
    config = zoo.config(context_length=128, max_total_tokens=5600)
    done = await run(config, asks(16, EVERYONE), shuffled(asks(16, EVERYONE, seed=1)))
    check(done, zoo)
    assert done.stats.evictions.get("arena/memory", 0) > 3
    assert done.stats.loads["device/ok"] > len(ADAPTERS) + 3
    assert done["skips_not_resident"] > 0


async def test_more_adapters_than_host(zoo: Zoo) -> None:
    """What left the host comes back from its source."""
    work = asks(16, EVERYONE)
    done = await run(zoo.config(max_loras_per_batch=2, max_loaded_loras=2), work, shuffled(work))
    check(done, zoo)
    assert done.stats.evictions.get("host/capacity", 0) > len(ADAPTERS)
    assert done.stats.loads["source/ok"] > len(ADAPTERS) + 2


async def test_a_name_loaded_again_is_another_adapter(zoo: Zoo) -> None:
    """The same name, the same prompt, other weights: nothing of the old ones is met, while others keep the chunks."""
    prompt = prompts(1, 60, 60, seed=11)[0]
    done = Run()
    async with local_engine(
        zoo.config(SMALL, max_lora_rank=256, lora_target_modules=LORA_MODULES, max_loras_per_batch=2)
    ) as engine:
        for name in ("five", "patterns", "five", "huge"):
            await engine.client.load_adapter("again", str(zoo.adapters[name]))
            for _ in range(2):
                work = [Ask(prompt, owner, asks(1, [None])[0].params) for owner in ("again", *SMALL)]
                done.answers += await send(engine, work)
                done.asks += [Ask(prompt, name, work[0].params), *work[1:]]
            await engine.client.unload_adapter("again")
        done.stats = await engine.stats()
    check(done, zoo)
    assert done["drains"] == 4
    assert done["prefix_hit_tokens"] > 0
    assert done.stats.evictions["arena/unload"] > 0


async def test_siblings_share_their_prompt(zoo: Zoo) -> None:
    work = asks(8, EVERYONE, least=40, most=90)
    done = Run()
    async with local_engine(zoo.config()) as engine:
        sent = (engine.ask(ask.prompt, ask.params, adapter=ask.adapter, n=3) for ask in work)
        for ask, choices in zip(work, await asyncio.gather(*sent), strict=True):
            done.answers += choices
            done.asks += [ask] * 3
        done.stats = await engine.stats()
    check(done, zoo)
    assert done["prefix_hit_tokens"] >= sum(2 * ((len(ask.prompt) - 1) // 16 * 16) for ask in work)


@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 14))])
async def test_everything_at_once(zoo: Zoo, seed: int) -> None:
    """Few slots, few chunks, short steps, arrivals all the time, and clients that go away."""
    config = zoo.config(
        context_length=160, max_total_tokens=5700, max_loras_per_batch=3, max_loaded_loras=5, chunked_prefill_size=32,
        max_running_requests=10,
    )  # fmt: skip
    shared = prompts(1, 33, 33, seed=9)[0]
    work = [Ask(shared + a.prompt, a.adapter, a.params) for a in asks(40, EVERYONE, most=60, max_tokens=20, seed=seed)]
    async with local_engine(config) as engine:
        sent = []
        for index, ask in enumerate(work):
            sent.append(asyncio.create_task(send(engine, [ask])))
            if index % 3 == 2:
                sent[-1].add_done_callback(lambda _: None)
                await asyncio.sleep(0.01)
                sent[-1].cancel()
        finished = await asyncio.gather(*sent, return_exceptions=True)
        await engine.settled()
        kept = [(a, f[0]) for a, f in zip(work, finished, strict=True) if isinstance(f, list)]
        done = Run([a for a, _ in kept], [f for _, f in kept], await engine.stats())
    check(done, zoo)
    assert 20 < len(kept) < 40
    assert done["aborted"] > 0
    assert done["prompt_chunks"] > 0
    assert done["prefix_hit_tokens"] > 0
    assert done.stats.evictions.get("arena/memory", 0) > 0

"""The client's streams: routing, choices, aborts, and what happens when the engine goes."""

import asyncio

import pytest

from engine.client import EngineClient
from engine.link import EngineLink, memory_pair
from engine.messages import (
    Abort,
    AdapterRemoved,
    AdapterUpdated,
    CallResult,
    GetStats,
    Heartbeat,
    LoadAdapter,
    Ready,
    RequestFailed,
    SequenceOutput,
    StartFailed,
    Stats,
    StepOutputs,
    Submit,
)
from engine.types import AdapterInfo, AdapterState, EngineError, ErrorCode, FinishReason, ModelInfo, SamplingParams

GREEDY = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
SQL = AdapterInfo(name="sql", adapter_id=1, source="s", state=AdapterState.HOST)
MODEL = ModelInfo(
    served_name="llama", model_path="m", folder="f", max_model_len=64, vocab_size=8, eos_token_ids=(2,),
    bos_token_id=1, generation_defaults={}, dtype="float32", device="cpu", block_tokens=16, chunk_bytes=256,
    num_chunks=4, enable_lora=True, max_loras_per_batch=2, max_loaded_loras=None, max_lora_rank=8,
    lora_target_modules=("q_proj",), lora_backend="torch",
)  # fmt: skip


async def connected() -> tuple[EngineClient, EngineLink]:
    gateway, engine = memory_pair()
    engine.post(Ready(model=MODEL, adapters=[SQL]))
    return await EngineClient.over(gateway), engine


async def test_outputs_reach_their_request_and_end_with_its_last_choice() -> None:
    client, engine = await connected()
    first = client.generate(prompt=[1], params=GREEDY, n=2)
    second = client.generate(prompt=[1, 2], params=GREEDY, adapter_id=1)
    assert [await engine.receive(), await engine.receive()] == [
        Submit(request_id=first.request_id, prompt=[1], n=2, params=GREEDY),
        Submit(request_id=second.request_id, prompt=[1, 2], params=GREEDY, adapter_id=1),
    ]
    a, b = first.request_id, second.request_id
    engine.post(StepOutputs(outputs=[SequenceOutput(a, 0, [5]), SequenceOutput(b, 0, [6], FinishReason.LENGTH)]))
    engine.post(StepOutputs(outputs=[SequenceOutput(a, 0, [7], FinishReason.STOP, 7)]))
    engine.post(StepOutputs(outputs=[SequenceOutput(a, 1, [8], FinishReason.LENGTH)]))
    assert [o.tokens for outputs in [x async for x in second] for o in outputs] == [[6]]
    assert [(o.choice, o.tokens) for outputs in [x async for x in first] for o in outputs] == [
        (0, [5]), (0, [7]), (1, [8]),
    ]  # fmt: skip
    assert client.open_requests == 0


async def test_an_aborted_choice_is_silent_and_leaving_the_block_aborts_the_rest() -> None:
    client, engine = await connected()
    async with client.generate(prompt=[1], params=GREEDY, n=3) as generation:
        await engine.receive()
        generation.abort(1)
        generation.abort(1)
        engine.post(StepOutputs(outputs=[SequenceOutput(generation.request_id, choice, [4]) for choice in range(3)]))
        assert [output.choice for output in await anext(generation)] == [0, 2]
    aborts = [await engine.receive(), await engine.receive()]
    assert aborts == [Abort(request_id=generation.request_id, choice=1), Abort(request_id=generation.request_id)]
    assert client.open_requests == 0


async def test_failures_and_calls_carry_the_engines_reason() -> None:
    client, engine = await connected()
    generation = client.generate(prompt=[1], params=GREEDY)
    engine.post(RequestFailed(request_id=generation.request_id, code=ErrorCode.QUEUE_FULL, message="full"))
    with pytest.raises(EngineError, match="full"):
        await anext(generation)
    assert client.open_requests == 0

    await engine.receive()
    load = asyncio.create_task(client.load_adapter("bad", "x", pinned=True))
    command = await engine.receive()
    assert isinstance(command, LoadAdapter)
    assert command.pinned
    engine.post(CallResult(call_id=command.call_id, code=ErrorCode.ADAPTER_INVALID, message="no config"))
    with pytest.raises(EngineError, match="no config") as caught:
        await load
    assert caught.value.code is ErrorCode.ADAPTER_INVALID


async def test_adapters_follow_the_engines_events() -> None:
    client, engine = await connected()
    engine.post(AdapterUpdated(adapter=AdapterInfo(name="new", adapter_id=2, source="n", state=AdapterState.HOST)))
    engine.post(AdapterRemoved(name="sql", adapter_id=1))
    engine.post(AdapterRemoved(name="new", adapter_id=1))  # an older load of the same name: not this one
    await asyncio.gather(engine.flush(), asyncio.sleep(0.01))
    assert set(client.adapters) == {"new"}


async def test_every_stats_is_seen_once() -> None:
    client, engine = await connected()
    seen: list[int] = []
    client.on_stats = lambda stats: seen.append(stats.step)
    engine.post(Heartbeat(stats=Stats(step=1), hung=True))
    asked = asyncio.create_task(client.stats())
    command = await engine.receive()
    assert isinstance(command, GetStats)
    engine.post(CallResult(call_id=command.call_id, stats=Stats(step=2)))
    assert (await asked).step == 2
    assert seen == [1, 2]
    assert client.hung


async def test_the_engines_death_fails_all_that_is_open() -> None:
    client, engine = await connected()
    generation = client.generate(prompt=[1], params=GREEDY)
    call = asyncio.create_task(client.stats())
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineError) as caught:
        await anext(generation)
    assert caught.value.code is ErrorCode.ENGINE_DEAD
    with pytest.raises(EngineError):
        await call
    await client.closed.wait()
    with pytest.raises(EngineError):
        client.generate(prompt=[1], params=GREEDY)


async def test_a_failed_start_is_raised_with_its_reason() -> None:
    gateway, engine = memory_pair()
    engine.post(StartFailed(code=ErrorCode.INVALID_REQUEST, message="the arena cannot hold one context"))
    with pytest.raises(EngineError, match="one context"):
        await EngineClient.over(gateway)
    gateway, engine = memory_pair()
    await engine.close()
    with pytest.raises(EngineError, match="died"):
        await EngineClient.over(gateway)

"""The engine's loop around a fake worker: planning ahead, aborts, back-pressure, failures, hung steps."""

import asyncio

import pytest

from engine import loop as engine_loop
from engine.types import EngineError, ErrorCode, FinishReason
from tests.engine.loop_harness import Harness, harness


async def test_requests_are_answered() -> None:
    async with harness() as engine:
        answers = await asyncio.gather(*(engine.ask(max_tokens=n) for n in (1, 5, 9)))
        assert [answer.tokens for answer in answers] == [[7], [7] * 5, [7] * 9]
        assert {answer.finish for answer in answers} == {FinishReason.LENGTH}


@pytest.mark.parametrize(("overlap", "depth"), [(True, 2), (False, 1)])
async def test_plans_ahead_of_a_running_step(overlap: bool, depth: int) -> None:
    async with harness(overlap=overlap) as engine:
        engine.worker.go.clear()
        asked = asyncio.create_task(engine.ask(max_tokens=6))
        await engine.until(lambda: len(engine.worker.plans) == depth)
        await engine.told()
        assert len(engine.worker.plans) == depth, "no further than allowed"
        if overlap:
            assert engine.worker.plans[1].sequences[0].tokens == (), "the first step's token is not known yet"
        engine.worker.go.set()
        assert (await asked).tokens == [7] * 6
        counters = (await engine.client.stats()).counters
        assert (counters["steps_planned_ahead"] > 0) == overlap


async def test_an_idle_loop_plans_nothing() -> None:
    async with harness() as engine:
        await engine.ask()
        await engine.told()
        planned = len(engine.worker.plans)
        for _ in range(20):
            await engine.told()
        assert len(engine.worker.plans) == planned


async def test_abort_takes_effect_within_one_step() -> None:
    async with harness() as engine:
        engine.worker.go.clear()
        asked = asyncio.create_task(engine.ask(max_tokens=100))
        await engine.until(lambda: len(engine.worker.plans) == 2)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await engine.told()
        assert not engine.scheduler.has_work, "it holds nothing from the moment its abort arrives"
        engine.worker.go.set()
        await engine.until(lambda: engine.scheduler.idle)
        assert len(engine.worker.plans) == 2, "only what was on its way was computed"


async def test_abort_of_one_leaves_the_others() -> None:
    async with harness() as engine:
        engine.worker.go.clear()
        asked = [asyncio.create_task(engine.ask(max_tokens=20)) for _ in range(3)]
        await engine.until(lambda: len(engine.worker.plans) == 2)
        asked[1].cancel()
        engine.worker.go.set()
        assert [(await asked[i]).tokens for i in (0, 2)] == [[7] * 20] * 2
        assert (await engine.client.stats()).counters["aborted"] == 1


async def test_refusals_reach_the_one_who_asked() -> None:
    async with harness(max_queued=0) as engine:
        with pytest.raises(EngineError) as refused:
            await engine.ask()
        assert refused.value.code is ErrorCode.QUEUE_FULL
        assert not engine.running.done()


@pytest.mark.parametrize("where", ["fail_forward", "fail_result"])
async def test_a_step_that_raises_ends_the_loop_with_its_error(where: str) -> None:
    async with harness(fails=True) as engine:
        await engine.ask()
        setattr(engine.worker, where, RuntimeError("out of order"))
        with pytest.raises(EngineError) as failed:
            await engine.ask()
        assert failed.value.code is ErrorCode.ENGINE_DEAD
        with pytest.raises(RuntimeError, match="out of order"):
            await engine.running


async def test_every_open_request_and_call_fails_with_the_loop() -> None:
    async with harness(fails=True) as engine:
        gate = engine.reader.hold("slow")
        engine.worker.go.clear()
        open_ones = [asyncio.create_task(engine.ask(max_tokens=50)) for _ in range(3)]
        loading = asyncio.create_task(engine.load("slow"))
        await engine.until(lambda: len(engine.worker.plans) == 2)
        engine.worker.fail_result = RuntimeError("out of order")
        engine.worker.go.set()
        for ended in await asyncio.gather(*open_ones, loading, return_exceptions=True):
            assert isinstance(ended, EngineError)
            assert ended.code is ErrorCode.ENGINE_DEAD
        gate.set()


async def test_shutdown_ends_it_well() -> None:
    async with harness() as engine:
        await engine.ask()
        await engine.client.shutdown()
        await engine.running


async def _hung(engine: Harness, expected: bool) -> None:
    await engine.until(lambda: engine.client.hung is expected)


async def test_a_hung_step_is_told_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "HEARTBEAT_SECONDS", 0.005)
    async with harness(hung_after=0.05) as engine:
        engine.worker.go.clear()
        asked = asyncio.create_task(engine.ask())
        await _hung(engine, True)
        engine.worker.go.set()
        assert (await asked).finish is FinishReason.LENGTH
        await _hung(engine, False)


async def test_back_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that does not read stops the steps; it is no hung step, aborts pass, and nothing is lost."""
    monkeypatch.setattr(engine_loop, "HEARTBEAT_SECONDS", 3600.0)
    async with harness(hung_after=0.02) as engine:
        reads = asyncio.Event()
        flushes = 0

        async def flush() -> None:
            nonlocal flushes
            flushes += 1
            await reads.wait()

        monkeypatch.setattr(engine.link, "flush", flush)
        asked = [asyncio.create_task(engine.ask(max_tokens=12)) for _ in range(2)]
        await engine.until(lambda: flushes > 0 and len(engine.worker.plans) > 1)
        asked.pop().cancel()
        await asyncio.sleep(0.04)  # many steps' time, and beyond what makes a step hung
        await engine.told()
        assert len(engine.worker.plans) <= 3
        assert not engine.loop._hung(), "the device has done its part"
        assert (await engine.client.stats()).counters["aborted"] == 1
        reads.set()
        assert (await asked[0]).tokens == [7] * 12


async def test_an_adapter_unloaded_while_nothing_runs_leaves_the_worker() -> None:
    async with harness() as engine:
        await engine.load("a")
        await engine.ask("a")
        assert engine.worker.resident
        await engine.client.unload_adapter("a")
        await engine.told()
        assert not engine.worker.resident

"""Messages survive both links; the end of the stream is seen by the peer."""

import asyncio
from pathlib import Path

import pytest

from engine.link import EngineLink, GatewayLink, engine_end, gateway_end, memory_pair
from engine.messages import Abort, CallResult, SequenceOutput, StepOutputs, Submit
from engine.types import ErrorCode, FinishReason, SamplingParams, TokenLogprob

Ends = tuple[GatewayLink, EngineLink]


async def socket_pair(path: Path) -> Ends:
    accepted: asyncio.Future[EngineLink] = asyncio.get_running_loop().create_future()
    await asyncio.start_unix_server(lambda r, w: accepted.set_result(engine_end(r, w)), path)
    return gateway_end(*await asyncio.open_unix_connection(path)), await accepted


@pytest.fixture(params=["socket", "memory"])
async def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Ends:
    return await socket_pair(tmp_path / "link") if request.param == "socket" else memory_pair()


async def test_commands_and_events_arrive_whole_and_in_order(ends: Ends) -> None:
    gateway, engine = ends
    params = SamplingParams(max_tokens=3, seed=2**63 - 1, logit_bias={7: -100.0}, stop_token_ids=(1, 2))
    submit = Submit(request_id=1, prompt=list(range(50_000)), n=2, adapter_id=9, params=params, salt="s")
    gateway.post(submit)
    gateway.post(Abort(request_id=1, choice=1))
    await gateway.flush()
    assert [await engine.receive(), await engine.receive()] == [submit, Abort(request_id=1, choice=1)]

    logprob = TokenLogprob(5, -0.25, 1, [(5, -0.25), (6, -2.0)])
    outputs = StepOutputs(
        outputs=[SequenceOutput(1, 0, [5], FinishReason.STOP, 5, [logprob], [None, logprob], cached_tokens=16)]
    )
    failed = CallResult(call_id=3, code=ErrorCode.ADAPTER_INVALID, message="rank 512 is beyond 256")
    engine.post(outputs)
    engine.post(failed)
    await engine.flush()
    assert [await gateway.receive(), await gateway.receive()] == [outputs, failed]


@pytest.mark.parametrize("closer", ["gateway", "engine"])
async def test_the_end_of_the_stream_reaches_the_peer(ends: Ends, closer: str) -> None:
    gateway, engine = ends
    if closer == "gateway":
        await gateway.close()
        assert await engine.receive() is None
        engine.post(StepOutputs(outputs=[]))  # a message to nobody is no error
    else:
        await engine.close()
        assert await gateway.receive() is None
        gateway.post(Abort(request_id=1))


async def test_one_that_closes_and_is_cancelled_does_not_end_the_others_wait(ends: Ends) -> None:
    gateway, engine = ends
    large = Submit(request_id=1, prompt=[2**30] * 1_000_000, params=SamplingParams(max_tokens=1, seed=0))
    gateway.post(large)  # more than the system holds, so that closing takes until the peer has read it
    first = asyncio.create_task(gateway.close())
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0)
    second = asyncio.create_task(gateway.close())
    assert await engine.receive() == large
    await second

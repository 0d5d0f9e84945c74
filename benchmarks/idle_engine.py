"""An engine that computes nothing: every request gets a token a step, as a device's engine would tell it.

A process that the gateway starts in the engine's place, by `benchmarks.gateway`.
"""

import argparse
import asyncio
import time

import msgspec
import uvloop

from engine.config import EngineConfig
from engine.link import EngineLink, engine_end
from engine.messages import Abort, Command, Heartbeat, Ready, SequenceOutput, Stats, StepOutputs, Submit
from engine.types import FinishReason, ModelInfo

STEP_SECONDS = 0.013  # an H200's of 256 sequences
TOKENS = range(68, 94)  # letters, in the tokenizer of tests.support.models
BEAT_SECONDS = 1.0


class IdleEngine:
    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._left: dict[int, int] = {}  # by request id: tokens to come

    async def run(self, config: EngineConfig) -> None:
        """Until the gateway goes."""
        self._link.post(Ready(model=_model(config), adapters=[]))
        tasks = [asyncio.create_task(work()) for work in (self._steps, self._beat)]
        while (command := await self._link.receive()) is not None:
            self._take(command)
        for task in tasks:
            task.cancel()

    def _take(self, command: Command) -> None:
        match command:
            case Submit(request_id=request_id, params=params):
                self._left[request_id] = params.max_tokens
            case Abort(request_id=request_id):
                self._left.pop(request_id, None)
            case _:
                pass

    async def _steps(self) -> None:
        due = time.perf_counter()
        while True:
            due = max(due + STEP_SECONDS, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            if outputs := [self._output(request_id) for request_id in list(self._left)]:
                self._link.post(StepOutputs(outputs=outputs))
                await self._link.flush()

    def _output(self, request_id: int) -> SequenceOutput:
        left = self._left[request_id] = self._left[request_id] - 1
        if not left:
            del self._left[request_id]
        return SequenceOutput(request_id, 0, [TOKENS[left % len(TOKENS)]], None if left else FinishReason.LENGTH)

    async def _beat(self) -> None:
        while True:
            self._link.post(Heartbeat(stats=Stats()))
            await asyncio.sleep(BEAT_SECONDS)


def _model(config: EngineConfig) -> ModelInfo:
    assert config.model_path is not None
    return ModelInfo(
        served_name=config.served_model_name, model_path=config.model_path, folder=config.model_path,
        max_model_len=config.context_length or 2048, vocab_size=256, eos_token_ids=(), bos_token_id=None,
        generation_defaults={}, dtype="bfloat16", device="none", block_tokens=16, chunk_bytes=65536, num_chunks=64,
        enable_lora=False, max_loras_per_batch=8, max_loaded_loras=None, max_lora_rank=64, lora_target_modules=(),
        lora_backend="torch",
    )  # fmt: skip


async def live(config: EngineConfig, path: str) -> None:
    gone = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = engine_end(reader, writer)
        await IdleEngine(link).run(config)
        await link.close()
        gone.set()

    async with await asyncio.start_unix_server(accept, path):
        await gone.wait()


def main() -> None:
    parser = argparse.ArgumentParser(fromfile_prefix_chars="@")  # as the gateway starts its engine
    for name in ("--socket", "--parent", "--config"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    config = msgspec.json.decode(args.config, type=EngineConfig)
    uvloop.run(live(config, args.socket))


if __name__ == "__main__":
    main()

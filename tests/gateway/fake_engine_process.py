"""A process that speaks the engine's side of the link, for the supervisor's tests. Run as a script.

`--lives` says how each life behaves, the last one for ever: ready; silent (no heartbeats); hung (says that a step
hangs); refuse; exit. Each life writes its settings to `--log`, a line each.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.link import EngineLink, engine_end
from engine.messages import (
    AdapterRemoved,
    AdapterUpdated,
    CallResult,
    Command,
    GetStats,
    Heartbeat,
    LoadAdapter,
    PinAdapter,
    Ready,
    SequenceOutput,
    Shutdown,
    StartFailed,
    Stats,
    StepOutputs,
    Submit,
    UnloadAdapter,
)
from engine.types import AdapterInfo, AdapterState, ErrorCode, FinishReason, ModelInfo

BEAT = 0.05  # seconds


class FakeProcess:
    """One life."""

    def __init__(self, life: str, config: EngineConfig, link: EngineLink) -> None:
        self._life = life
        self._config = config
        self._link = link
        self._adapters: dict[str, AdapterInfo] = {}

    async def run(self) -> None:
        if self._life == "refuse":
            self._link.post(StartFailed(code=ErrorCode.ADAPTER_INVALID, message="the reason"))
            await self._link.flush()
            return
        for i, entry in enumerate((*self._config.lora_paths, *self._config.lora_restored)):
            self._adapters[entry.name] = self._adapter(
                i, entry.name, entry.path, pinned=entry.pinned, revision=entry.revision
            )
        self._link.post(Ready(model=self._model(), adapters=list(self._adapters.values())))
        beat = asyncio.create_task(self._beat())
        while (command := await self._link.receive()) is not None and not isinstance(command, Shutdown):
            self._handle(command)
        beat.cancel()

    async def _beat(self) -> None:
        while self._life != "silent":
            self._link.post(Heartbeat(stats=Stats(), hung=self._life == "hung"))
            await asyncio.sleep(BEAT)

    def _handle(self, command: Command) -> None:
        match command:
            case LoadAdapter(call_id=call_id, name=name, source=source, pinned=pinned, revision=revision):
                if "broken" in source:
                    self._link.post(CallResult(call_id=call_id, code=ErrorCode.ADAPTER_INVALID, message="broken"))
                else:
                    self._put(call_id, self._adapter(call_id, name, source, pinned=bool(pinned), revision=revision))
            case PinAdapter(call_id=call_id, name=name, pinned=pinned):
                self._put(call_id, msgspec.structs.replace(self._adapters[name], pinned=pinned))
            case UnloadAdapter(call_id=call_id, name=name):
                self._link.post(AdapterRemoved(name=name, adapter_id=self._adapters.pop(name).adapter_id))
                self._link.post(CallResult(call_id=call_id))
            case GetStats(call_id=call_id):
                self._link.post(CallResult(call_id=call_id, stats=Stats()))
            case Submit(request_id=request_id, prompt=prompt, params=params):
                finish = FinishReason.LENGTH if params.max_tokens == 1 else None  # longer ones never end
                outputs = [SequenceOutput(request_id, 0, [prompt[0]], finish)]
                self._link.post(StepOutputs(outputs=outputs))
            case _:
                pass

    def _put(self, call_id: int, adapter: AdapterInfo) -> None:
        self._adapters[adapter.name] = adapter
        self._link.post(AdapterUpdated(adapter=adapter))
        self._link.post(CallResult(call_id=call_id, adapter=adapter))

    def _adapter(
        self, adapter_id: int, name: str, source: str, *, pinned: bool, revision: str | None = None
    ) -> AdapterInfo:
        state = AdapterState.HOST
        return AdapterInfo(
            name=name, adapter_id=adapter_id, source=source, revision=revision, state=state, pinned=pinned
        )

    def _model(self) -> ModelInfo:
        assert self._config.model_path is not None
        return ModelInfo(
            served_name=self._config.served_model_name, model_path="m", folder=self._config.model_path,
            max_model_len=256, vocab_size=512, eos_token_ids=(0,), bos_token_id=None, generation_defaults={},
            dtype="float32", device="cpu", block_tokens=16, chunk_bytes=65536, num_chunks=64, enable_lora=True,
            max_loras_per_batch=4, max_loaded_loras=None, max_lora_rank=self._config.max_lora_rank or 64,
            lora_target_modules=self._config.lora_target_modules or ("q_proj",), lora_backend="torch",
        )  # fmt: skip


async def live(life: str, config: EngineConfig, path: str) -> None:
    done = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = engine_end(reader, writer)
        await FakeProcess(life, config, link).run()
        await link.close()
        done.set()

    async with await asyncio.start_unix_server(accept, path):
        await done.wait()


def main() -> None:
    parser = argparse.ArgumentParser(fromfile_prefix_chars="@")
    for name in ("--lives", "--log", "--socket", "--parent", "--config"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    log = Path(args.log)
    lives = args.lives.split(",")
    number = len(log.read_text().splitlines()) if log.exists() else 0
    with log.open("a") as handle:
        handle.write(f"{os.getpid()} {args.config}\n")
    life = lives[min(number, len(lives) - 1)]
    if life == "exit":
        sys.exit(3)
    asyncio.run(live(life, msgspec.json.decode(args.config, type=EngineConfig), args.socket))


if __name__ == "__main__":
    main()

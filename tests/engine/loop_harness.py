"""The loop, the pipeline and the loader around a worker, a host tier and a reader that do as a test says."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from engine.adapters.host import HostTier
from engine.adapters.hub import Hub
from engine.adapters.intake import AdapterReader
from engine.adapters.loader import AdapterLoader
from engine.adapters.names import check_adapter_name
from engine.client import EngineClient
from engine.config import LoraPath
from engine.link import MemoryLink, memory_pair
from engine.loop import EngineLoop
from engine.messages import Command, Event, Ready
from engine.pipeline import Pipeline, step_thread
from engine.plan import AdapterLoad, SequenceResult, StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.types import EngineError, ErrorCode, FinishReason, ModelInfo, SamplingParams
from engine.worker.breaks import Breaks

BLOCK, CONTEXT, PAGES = 16, 128, 3
SIZES: dict[str, Any] = {
    "num_chunks": 64,
    "block_tokens": BLOCK,
    "chunk_bytes": 256,
    "max_model_len": CONTEXT,
    "max_running": 8,
    "enable_lora": True,
    "max_slots": 3,
    "max_adapter_chunks": PAGES,
}


def params(max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)


class FakeWorker:
    """Samples 7 for everyone. A test holds steps and copies, or makes them fail."""

    graph_replays = 0

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.planned = asyncio.Event()  # a plan arrived since it was cleared
        self.go = threading.Event()  # steps run while it is set
        self.go.set()
        self.fail_forward: Exception | None = None
        self.fail_result: Exception | None = None
        self.copies_go = True
        self.fail_copy: Exception | None = None
        self.held: list[Callable[[], None]] = []
        self.resident: dict[int, tuple[int, ...]] = {}
        self._loop = asyncio.get_running_loop()

    def forward(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._loop.call_soon_threadsafe(self.planned.set)
        if self.fail_forward is not None:
            raise self.fail_forward

    def sample(self, plan: StepPlan) -> "FakePending":
        return FakePending(self, plan)

    def load(self, load: AdapterLoad, adapter: object, done: Callable[[int, BaseException | None], None]) -> None:
        def copy() -> None:
            if self.fail_copy is None:
                self.resident[load.adapter_id] = load.chunks
            done(load.adapter_id, self.fail_copy)

        if self.copies_go:
            copy()
        else:
            self.held.append(copy)

    def drop(self, adapter_id: int) -> None:
        self.resident.pop(adapter_id, None)


@dataclass
class FakePending:
    worker: FakeWorker
    plan: StepPlan

    def result(self) -> StepResult:
        assert self.worker.go.wait(30)
        if self.worker.fail_result is not None:
            raise self.worker.fail_result
        return StepResult(self.plan.step, [SequenceResult([7] if s.sample else []) for s in self.plan.sequences], 0.01)


class FakeReader:
    """Sources are contents by name; reading waits while its source is held."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self.reads: list[str] = []
        self.reading = asyncio.Event()  # a read began since it was cleared
        self.gates: dict[str, threading.Event] = {}
        self._loop = asyncio.get_running_loop()

    def check_name(self, name: str) -> None:
        check_adapter_name(name, "llama")

    def read(self, source: str, revision: str | None) -> Any:
        self.reads.append(source)
        self._loop.call_soon_threadsafe(self.reading.set)
        if source in self.gates:
            assert self.gates[source].wait(30)
        if source not in self.sources:
            raise EngineError(ErrorCode.ADAPTER_INVALID, f"{source} is not there")
        content = self.sources[source]
        if content == "fault":
            raise RuntimeError("a fault of ours")
        return SimpleNamespace(spec=SimpleNamespace(rank=8, module_names=("q_proj",), content_hash=content))

    def hold(self, source: str) -> threading.Event:
        self.gates[source] = threading.Event()
        return self.gates[source]


class FakeHost:
    """Pages are the content's name."""

    def __init__(self) -> None:
        self.adapters: dict[int, str] = {}

    def layout(self, spec: Any) -> Any:
        return SimpleNamespace(chunks=PAGES)

    def store(self, adapter_id: int, file: Any) -> None:
        assert adapter_id not in self.adapters
        self.adapters[adapter_id] = file.spec.content_hash

    def get(self, adapter_id: int) -> str | None:
        return self.adapters.get(adapter_id)

    def rename(self, adapter_id: int, renewed: int) -> None:
        self.adapters[renewed] = self.adapters.pop(adapter_id)

    def drop(self, adapter_id: int) -> None:
        del self.adapters[adapter_id]


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass
class Harness:
    worker: FakeWorker
    host: FakeHost
    reader: FakeReader
    scheduler: Scheduler
    loader: AdapterLoader
    loop: EngineLoop
    client: EngineClient
    link: MemoryLink[Command, Event]
    running: "asyncio.Task[None]"

    async def ask(self, adapter: str | None = None, max_tokens: int = 4, prompt: int = 5) -> Choice:
        adapter_id = None if adapter is None else self.client.adapters[adapter].adapter_id
        choice = Choice()
        tokens = list(range(prompt))
        async with self.client.generate(prompt=tokens, params=params(max_tokens), adapter_id=adapter_id) as generation:
            async for outputs in generation:
                for output in outputs:
                    choice.tokens += output.tokens
                    choice.finish = output.finish or choice.finish
        return choice

    async def load(self, name: str, content: str = "one", **settings: Any) -> int:
        self.reader.sources.setdefault(name, content)
        return (await self.client.load_adapter(name, name, **settings)).adapter_id

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets the loop turn until the condition holds."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the parts have nobody to tell but tests
                await asyncio.sleep(0.001)

    async def told(self) -> None:
        """Until what was asked so far has begun, and what the engine said of it was read."""
        for _ in range(3):
            await self.client.stats()

    def sequences_planned(self) -> int:
        return sum(len(plan.sequences) for plan in self.worker.plans)


@contextlib.asynccontextmanager
async def harness(
    *, paths: Sequence[LoraPath] = (), sources: dict[str, str] | None = None, overlap: bool = True,
    hung_after: float = 60.0, fails: bool = False, restored: Sequence[LoraPath] = (), hub: Hub | None = None,
    **sizes: Any,
) -> AsyncIterator[Harness]:  # fmt: skip
    """A running loop; checks at the end that it ran well (or, with `fails`, leaves its failure to the test)."""
    gateway_end, engine_end = memory_pair()
    worker, host, reader = FakeWorker(), FakeHost(), FakeReader()
    reader.sources.update(sources or {})
    scheduler = Scheduler(SchedulerConfig(**(SIZES | sizes)))
    wake = asyncio.Event()
    loader = AdapterLoader(
        scheduler.adapters,
        cast(HostTier, host),
        worker,
        cast(AdapterReader, reader),
        scheduler.counters,
        engine_end.post,
        wake,
        hub,
    )
    pipeline = Pipeline(worker, step_thread(), Breaks())
    loop = EngineLoop(scheduler, loader, pipeline, engine_end, wake, overlap=overlap, hung_after=hung_after)
    try:
        await loader.start(paths, scheduler.config.max_loaded, restored)
        engine_end.post(Ready(model=model_info(), adapters=scheduler.adapters.infos()))
        running = asyncio.create_task(loop.run())
        running.add_done_callback(lambda _: asyncio.ensure_future(engine_end.close()))
        client = await EngineClient.over(gateway_end)
        made = Harness(worker, host, reader, scheduler, loader, loop, client, engine_end, running)
        yield made
        if not fails:
            await made.until(lambda: scheduler.idle)
            scheduler.check()
        await client.close()
        await asyncio.gather(running, return_exceptions=True)
        if not fails:
            running.result()
    finally:
        worker.go.set()
        for gate in reader.gates.values():
            gate.set()
        loader.close()
        pipeline.close()


def model_info() -> ModelInfo:
    return ModelInfo(
        served_name="llama", model_path="llama", folder="", max_model_len=CONTEXT, vocab_size=50, eos_token_ids=(),
        bos_token_id=None, generation_defaults={}, dtype="float32", device="cpu", block_tokens=BLOCK, chunk_bytes=256,
        num_chunks=64, enable_lora=True, max_loras_per_batch=3, max_loaded_loras=None, max_lora_rank=8,
        lora_target_modules=("q_proj",), lora_backend="torch",
    )  # fmt: skip

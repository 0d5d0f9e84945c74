"""Puts one engine together: worker, brain, host tier, loader and loop, in the order in which each needs the others."""

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from engine.adapters.dummy import DummyReader
from engine.adapters.host import HostTier, default_budget
from engine.adapters.hub import Hub
from engine.adapters.intake import AdapterReader
from engine.adapters.loader import AdapterLoader
from engine.adapters.peft import inspect_limits
from engine.adapters.snapshot import fetch_from_hub
from engine.adapters.source import resolve_source
from engine.adapters.spec import AdapterLimits
from engine.config import EngineConfig, LoraPath
from engine.link import EngineLink
from engine.loop import HUNG_SECONDS, EngineLoop
from engine.messages import Ready
from engine.models.dims import LORA_MODULES
from engine.models.generation import generation_defaults
from engine.models.registry import load_config
from engine.models.source import resolve_model
from engine.models.tokenizer import tokenizer_folder
from engine.pipeline import Pipeline, step_thread
from engine.progress import show_progress
from engine.scheduler import Scheduler, scheduler_config
from engine.types import AdapterInfo, EngineError, ModelInfo
from engine.worker.memory import DEFAULT_LORA_RANK, StartupError, largest_adapter_chunks
from engine.worker.worker import DTYPES, Worker, WorkerInfo

HUNG_STEPS = 20  # times the largest step seen at start


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine's parts, for the process and for tests."""

    scheduler: Scheduler
    worker: Worker
    host: HostTier
    loader: AdapterLoader
    pipeline: Pipeline
    loop: EngineLoop

    async def run(self) -> None:
        """Serves until the gateway goes."""
        await self.loop.run()

    def close(self) -> None:
        """Ends the engine's threads; a step that runs is waited for."""
        self.loader.close()
        self.pipeline.close()
        self.host.close()
        self.worker.close()


async def build(config: EngineConfig, link: EngineLink) -> Engine:
    """Loads the base model and the adapters of --lora-paths and says `Ready`.

    Raises what names the reason: ModelSourceError, UnsupportedModelError, StartupError, EngineError.
    """
    folder = await asyncio.to_thread(resolve_model, config.model_path, config.revision)
    config = await asyncio.to_thread(with_limits, config)
    await asyncio.to_thread(refuse_longer_context, config, folder)
    launcher = step_thread()
    engine = _assemble(config, await _start_worker(config, folder, launcher), launcher, link)
    try:
        await engine.loader.start(config.lora_paths, config.max_loaded_loras, config.lora_restored)
    except BaseException:
        engine.close()
        raise
    tokenizer = await asyncio.to_thread(tokenizer_folder, folder)
    adapters: list[AdapterInfo] = engine.scheduler.adapters.infos()
    link.post(Ready(model=_model_info(config, engine.worker.info, folder, tokenizer), adapters=adapters))
    await link.flush()
    return engine


async def _start_worker(config: EngineConfig, folder: Path, launcher: ThreadPoolExecutor) -> Worker:
    """Starts it on the thread that launches steps, which becomes the only one that computes on several cores.

    Each thread that does so keeps a team of OpenMP threads. With more of them than cores OpenMP no longer lets a
    team spin between two operations but puts it to sleep, several hundred times a step: half of the CPU's speed.
    """
    loop = asyncio.get_running_loop()
    worker = await loop.run_in_executor(launcher, partial(Worker.start, config, folder, progress=show_progress()))
    torch.set_num_threads(1)  # for every thread that has not computed yet
    return worker


def with_limits(config: EngineConfig) -> EngineConfig:
    """--max-lora-rank and --lora-target-modules filled in: from --lora-paths, else rank 256 and all modules.

    Blocking; raises EngineError for a path that cannot be read.
    """
    config = msgspec.structs.replace(
        config, enable_lora=config.enable_lora or bool(config.lora_paths or config.lora_restored)
    )
    rank, modules = config.max_lora_rank, config.lora_target_modules
    if config.lora_paths and (rank is None or modules is None):
        inferred = _inferred(config.lora_paths, config.max_lora_hub_bytes)
        rank = inferred[0] if rank is None else rank
        modules = inferred[1] if modules is None else modules
    return msgspec.structs.replace(
        config,
        max_lora_rank=DEFAULT_LORA_RANK if rank is None else rank,
        lora_target_modules=LORA_MODULES if modules is None else modules,
    )


def refuse_longer_context(config: EngineConfig, folder: Path) -> None:
    """Raises StartupError where --context-length is more than the model's positions; it is not cut in silence."""
    longest = load_config(folder).max_position
    if config.context_length is not None and config.context_length > longest:
        raise StartupError(f"--context-length {config.context_length}: the model has {longest} positions")


def _inferred(paths: Iterable[LoraPath], max_hub_bytes: int) -> tuple[int, tuple[str, ...]]:
    """The largest rank and the modules. Raises EngineError naming the path."""
    ranks, modules = [], set[str]()
    for path in paths:
        try:
            rank, names = inspect_limits([resolve_source(path.path, path.revision, max_hub_bytes)])
        except EngineError as error:
            raise EngineError(error.code, f"--lora-paths {path.name}={path.path}: {error.message}") from error
        ranks.append(rank)
        modules.update(names)
    return max(ranks), tuple(module for module in LORA_MODULES if module in modules)


def _assemble(config: EngineConfig, worker: Worker, launcher: ThreadPoolExecutor, link: EngineLink) -> Engine:
    info = worker.info
    assert config.max_lora_rank is not None
    assert config.lora_target_modules is not None
    host_bytes = default_budget() if config.max_host_lora_bytes is None else config.max_host_lora_bytes
    on_gpu = info.device.startswith("cuda")
    host_bytes = host_bytes if config.enable_lora else 0
    host = HostTier(info.dims, info.geometry, DTYPES[info.dtype], host_bytes, pinned=on_gpu, breaks=worker.breaks)
    scheduler = Scheduler(
        scheduler_config(
            config,
            num_chunks=info.num_chunks,
            block_tokens=info.geometry.block_tokens,
            chunk_bytes=info.geometry.chunk_bytes,
            max_model_len=info.context_length,
            eos_token_ids=frozenset(info.model.eos_token_ids),
            max_adapter_chunks=largest_adapter_chunks(config, info.dims, info.geometry),
            on_gpu=on_gpu,
            max_host_pages=host.bytes_capacity // info.geometry.chunk_bytes,
            unix_offset=time.time() - asyncio.get_running_loop().time(),
        )
    )
    wake = asyncio.Event()
    limits = AdapterLimits(config.max_lora_rank, config.lora_target_modules)
    make_reader = DummyReader if config.load_format == "dummy" else AdapterReader
    inside = None if config.lora_dir is None else Path(config.lora_dir)
    reader = make_reader(info.dims, limits, config.served_model_name, worker.breaks, inside)
    hub = None if config.load_format == "dummy" else _hub(config)
    loader = AdapterLoader(scheduler.adapters, host, worker, reader, scheduler.counters, link.post, wake, hub)
    pipeline = Pipeline(worker, launcher, worker.breaks)
    hung_after = max(HUNG_SECONDS, HUNG_STEPS * info.largest_step_seconds)
    overlap = not config.disable_overlap_schedule
    loop = EngineLoop(scheduler, loader, pipeline, link, wake, overlap=overlap, hung_after=hung_after)
    return Engine(scheduler, worker, host, loader, pipeline, loop)


def _hub(config: EngineConfig) -> Hub:
    return Hub(config.lora_hub_timeout, fetch=partial(fetch_from_hub, max_bytes=config.max_lora_hub_bytes))


def _model_info(config: EngineConfig, info: WorkerInfo, folder: Path, tokenizer: Path) -> ModelInfo:
    assert config.max_lora_rank is not None
    assert config.lora_target_modules is not None
    return ModelInfo(
        served_name=config.served_model_name,
        model_path=config.model_path or config.served_model_name,
        folder=str(tokenizer),
        max_model_len=info.context_length,
        vocab_size=info.dims.vocab,
        eos_token_ids=tuple(info.model.eos_token_ids),
        bos_token_id=info.model.bos_token_id,
        generation_defaults=generation_defaults(folder),
        dtype=info.dtype,
        device=info.device,
        block_tokens=info.geometry.block_tokens,
        chunk_bytes=info.geometry.chunk_bytes,
        num_chunks=info.num_chunks,
        enable_lora=config.enable_lora,
        max_loras_per_batch=config.max_loras_per_batch,
        max_loaded_loras=config.max_loaded_loras,
        max_lora_rank=config.max_lora_rank,
        lora_target_modules=config.lora_target_modules,
        lora_backend=info.lora_backend,
        parameters=info.dims.parameters(tied=info.model.tie_word_embeddings),
        created=int(time.time()),
    )

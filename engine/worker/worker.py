"""One rank: weights, arena, adapters and the runner. It decides nothing; the loop hands it plans."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.adapters.bank import AdapterBank, HostPages
from engine.config import EngineConfig
from engine.geometry import Geometry, make_geometry
from engine.layers.attention import TorchAttention
from engine.layers.linear import cpu_has_bfloat16
from engine.layers.rotary import Rotary
from engine.models.config import ModelConfig
from engine.models.decoder import load_decoder
from engine.models.dims import ModelDims
from engine.models.registry import load_config
from engine.models.weights import Progress, open_weights
from engine.plan import AdapterLoad, StepPlan
from engine.worker.breaks import BREAK_SHARE, Breaks
from engine.worker.lora import LoraChooser
from engine.worker.memory import ArenaSize, StartupError, allowed_bytes, size_arena
from engine.worker.rows import make_rows
from engine.worker.runner import Pending, Runner
from engine.worker.sampler import Sampler
from engine.worker.warmup import largest_step, timed

CPU_STEP_TOKENS = 256
GPU_STEP_TOKENS = 2048
MIRROR_SHARE = 2  # the mirror of decoding sequences may take this fraction (1 / n) of the arena's bytes
MERGED_SHARE = 4  # merged adapters beside the arena may take this fraction (1 / n) of its bytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What the rest of the engine must know of the worker, free of torch."""

    model: ModelConfig
    dims: ModelDims
    geometry: Geometry
    num_chunks: int
    context_length: int
    step_tokens: int  # tokens a step may hold
    max_running: int  # state rows
    dtype: str
    device: str
    lora_backend: str
    largest_step_seconds: float


class StepRunner(Protocol):
    """The part that runs steps: Runner, or DeviceRunner on a GPU."""

    @property
    def graph_replays(self) -> int: ...

    def forward(self, plan: StepPlan) -> None: ...

    def sample(
        self, plan: StepPlan, masks: Mapping[int, Tensor] | None = None, force: Mapping[int, int] | None = None
    ) -> Pending: ...


class Bank(Protocol):
    """The part that holds resident adapters: AdapterBank, or DeviceBank on a GPU."""

    def load(
        self, load: AdapterLoad, adapter: HostPages, done: Callable[[int, BaseException | None], None]
    ) -> None: ...

    def drop(self, adapter_id: int) -> None: ...

    def poison(self, chunks: Sequence[int]) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None: ...


class Worker:
    """`forward` and `sample` run on one step thread, `load` and `drop` on the loop's."""

    def __init__(
        self, info: WorkerInfo, runner: StepRunner, bank: Bank, lora_steps: Mapping[str, int], threads: int,
        breaks: Breaks,
    ) -> None:  # fmt: skip
        self.info = info
        self.breaks = breaks  # for whoever runs steps, and for what loads adapters beside them
        self._runner = runner
        self._bank = bank
        self._lora_steps = lora_steps
        self._threads = threads
        self._prepared = threading.local()
        self._prepared.done = True  # by `_start`, for the thread that made the worker

    @classmethod
    def start(cls, config: EngineConfig, folder: Path, *, progress: Progress) -> "Worker":
        """Loads the weights and allocates the arena.

        `progress(stage, done, total)` is called as weights load. Raises UnsupportedModelError for a checkpoint that
        the decoder does not understand, StartupError for settings that cannot be served here.
        """
        return _start(config, folder, progress)

    def warmed_up(self) -> "Worker":
        """Runs the largest step once and notes how long it took."""
        info = self.info
        plan = largest_step(info.step_tokens, info.context_length, info.num_chunks, info.geometry)
        seconds = timed(lambda: (self.forward(plan), self.sample(plan).result()))
        self.info = replace(info, largest_step_seconds=seconds)
        return self

    @property
    def lora_steps(self) -> Mapping[str, int]:
        """Steps by the way their adapters were computed: base, stacked, segmented; on a GPU base, triton."""
        return self._lora_steps

    @property
    def graph_replays(self) -> int:
        """Steps that ran as a captured graph."""
        return self._runner.graph_replays

    def load(self, load: AdapterLoad, adapter: HostPages, done: Callable[[int, BaseException | None], None]) -> None:
        """Brings an adapter's pages into its chunks; returns at once.

        `done(adapter_id, error)` is called from another thread when the adapter may enter a plan.
        """
        self._bank.load(load, adapter, done)

    def drop(self, adapter_id: int) -> None:
        """The adapter's chunks are about to be reused: no plan names it from now on."""
        self._bank.drop(adapter_id)

    @torch.inference_mode()
    def poison(self, chunks: Sequence[int]) -> None:
        """For tests: fills freed chunks with NaN."""
        self._bank.poison(chunks)

    def close(self) -> None:
        """Ends the background thread; loads that have not begun never report."""
        self._bank.close()

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """Launches the plan's tokens through the layers."""
        self._prepare_thread()
        self._runner.forward(plan)

    @torch.inference_mode()
    def sample(
        self, plan: StepPlan, masks: Mapping[int, Tensor] | None = None, force: Mapping[int, int] | None = None
    ) -> Pending:
        """Launches the sampling of the plan that `forward` had last.

        `masks`: for a sequence_id what its token may be, [vocab] bool. `force`: for a sequence_id the token that it
        gets whatever the logits say; its log-probability is reported all the same.
        """
        self._prepare_thread()
        return self._runner.sample(plan, masks, force)

    def _prepare_thread(self) -> None:
        """torch keeps the number of threads for each calling thread."""
        if not getattr(self._prepared, "done", False):
            torch.set_num_threads(self._threads)
            self._prepared.done = True


def _start(config: EngineConfig, folder: Path, progress: Progress) -> Worker:
    device, backend = choose_device(config)
    if backend == "triton":
        from engine.worker.device_start import start_device  # triton is not on every platform

        return start_device(config, folder, device, progress)
    model = load_config(folder)
    dtype = dtype_of(config, model, device)
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    geometry = make_geometry(model.dims, dtype.itemsize)
    context = min(config.context_length or model.max_position, model.max_position)
    size = size_arena(config, model.dims, geometry, context, allowed_bytes(config, device))
    source = open_weights(folder, config.load_format, dtype, device)
    with torch.inference_mode():
        decoder = load_decoder(model, source, device, progress)
        source.close()
        arena = torch.zeros(size.chunks, geometry.chunk_elements, dtype=dtype, device=device)
    breaks = Breaks(BREAK_SHARE if threads >= len(os.sched_getaffinity(0)) else 0.0)
    bank = AdapterBank(arena, model.dims, breaks, arena.nbytes // MERGED_SHARE, config.max_loras_per_batch)
    chooser = LoraChooser(bank, config.lora_stack)
    rows = make_rows(config.max_running_requests, geometry.blocks(context), device)
    attention = TorchAttention(
        arena,
        model.dims,
        geometry.block_tokens,
        Rotary(model.rope, model.dims.head_dim, context, dtype, device),
        model.sliding_window,
        model.sliding_layers,
        mirror_bytes=arena.nbytes // MIRROR_SHARE if device.type == "cpu" else 0,
    )
    sampler = Sampler(rows, config.max_running_requests, model.dims.vocab, model.eos_token_ids, device)
    runner = Runner(decoder, attention, chooser, rows, sampler, geometry.block_tokens, device)
    info = make_info(config, model, geometry, size, dtype, device, step_tokens_of(config, device, context))
    return Worker(info, runner, bank, chooser.counts, threads, breaks).warmed_up()


def make_info(
    config: EngineConfig,
    model: ModelConfig,
    geometry: Geometry,
    size: ArenaSize,
    dtype: torch.dtype,
    device: torch.device,
    step_tokens: int,
    backend: str = "torch",
) -> WorkerInfo:
    return WorkerInfo(
        model=model,
        dims=model.dims,
        geometry=geometry,
        num_chunks=size.chunks,
        context_length=size.context_length,
        step_tokens=step_tokens,
        max_running=config.max_running_requests,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        lora_backend=backend,
        largest_step_seconds=0.0,
    )


def step_tokens_of(config: EngineConfig, device: torch.device, context: int) -> int:
    size = config.chunked_prefill_size
    if size is None:
        return CPU_STEP_TOKENS if device.type == "cpu" else GPU_STEP_TOKENS
    return context if size == -1 else size


def choose_device(config: EngineConfig) -> tuple[torch.device, str]:
    """(device, LoRA backend): a GPU with triton where there is one, else the CPU with torch."""
    if config.tp_size != 1:
        raise StartupError(f"--tp-size {config.tp_size}: tensor parallelism is not built yet")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no GPU here; use cpu")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.lora_backend == "triton" and not on_gpu:
        raise StartupError("--lora-backend triton needs a GPU; use torch")
    if config.lora_backend == "torch" and on_gpu:
        raise StartupError("--lora-backend torch is the CPU's; use triton, or --device cpu beside it")
    return (torch.device("cuda", 0), "triton") if on_gpu else (torch.device("cpu"), "torch")


def dtype_of(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return DTYPES[model.dtype]

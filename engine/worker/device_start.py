"""Starts a worker whose layers are Triton kernels: weights, buffers, a trial run, the arena in what is left, graphs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters.device_bank import DeviceBank
from engine.config import EngineConfig
from engine.geometry import Geometry, make_geometry
from engine.layers.device_rotary import rotary_table
from engine.models.config import ModelConfig
from engine.models.decoder_buffers import DecoderBuffers
from engine.models.device_decoder import DeviceDecoder
from engine.models.device_weights import load_weights
from engine.models.registry import load_config
from engine.models.weights import Progress, open_weights
from engine.worker.accelerator import Accelerator, make_accelerator
from engine.worker.breaks import Breaks
from engine.worker.device_batch import Packer
from engine.worker.device_runner import DeviceRunner
from engine.worker.device_sampler import DeviceSampler
from engine.worker.memory import adapter_modules, allowed_bytes, size_arena
from engine.worker.rows import make_rows
from engine.worker.shapes import Shapes, make_machine
from engine.worker.warmup import largest_step
from engine.worker.worker import Worker, dtype_of, make_info, step_tokens_of
from kernels.ahead import default_threads
from kernels.launch import multiprocessors

STEP_THREADS = 1  # of torch on the CPU: the device does the work


@dataclass(frozen=True, slots=True)
class Setting:
    """What everything at start is made from."""

    config: EngineConfig
    model: ModelConfig
    geometry: Geometry
    dtype: torch.dtype
    context: int
    step_tokens: int
    shapes: Shapes
    accelerator: Accelerator

    @property
    def lora(self) -> bool:
        return self.config.enable_lora or bool(self.config.lora_paths)

    @property
    def compile_threads(self) -> int:
        threads = self.config.compile_threads
        return default_threads() if threads is None else threads


@torch.inference_mode()
def start_device(config: EngineConfig, folder: Path, device: torch.device, progress: Progress) -> Worker:
    """As Worker.start; on the CPU the kernels run in Triton's interpreter, for tests."""
    setting = _setting(config, folder, device)
    runner = _runner(setting, folder, progress)
    if device.type == "cuda":
        _trial(setting, runner, progress)
    size = size_arena(config, setting.model.dims, setting.geometry, setting.context, allowed_bytes(config, device))
    arena = _arena(setting, size.chunks)
    bank = _bank(setting, arena)
    runner.use(arena, bank)
    info = make_info(
        config, setting.model, setting.geometry, size, setting.dtype, device, setting.step_tokens, "triton"
    )
    worker = Worker(info, runner, bank, runner.lora_steps, STEP_THREADS, Breaks())
    if device.type == "cuda":
        worker.warmed_up()
        if not config.disable_cuda_graph:
            runner.capture(lora=setting.lora, progress=progress)
    return worker


def _setting(config: EngineConfig, folder: Path, device: torch.device) -> Setting:
    model = load_config(folder)
    dtype = dtype_of(config, model, device)
    geometry = make_geometry(model.dims, dtype.itemsize)
    context = min(config.context_length or model.max_position, model.max_position)
    step_tokens = step_tokens_of(config, device, context)
    machine = make_machine(config, model, geometry, multiprocessors(device), context, step_tokens)
    shapes = Shapes(machine, config.cuda_graph_max_bs)
    return Setting(config, model, geometry, dtype, context, step_tokens, shapes, make_accelerator(device))


def _runner(setting: Setting, folder: Path, progress: Progress) -> DeviceRunner:
    config, model, shapes, accelerator = setting.config, setting.model, setting.shapes, setting.accelerator
    device, machine, dims = accelerator.device, shapes.machine, model.dims
    source = open_weights(folder, config.load_format, setting.dtype, device)
    weights = load_weights(model, source, device, progress)
    source.close()
    rows = make_rows(machine.max_running, setting.geometry.blocks(setting.context), device)
    largest = shapes.largest()
    tokens, samples = max(shape.tokens for shape in largest), max(shape.sequences for shape in largest)
    buffers = DecoderBuffers(model, tokens, samples, setting.dtype, device)
    table = rotary_table(model.rope, dims.head_dim, setting.context, device)
    modules = adapter_modules(config)
    decoder = DeviceDecoder(model, weights, buffers, table, machine.kv, rows.last_token, accelerator, modules)
    sampler = DeviceSampler(rows, machine.max_running, samples, dims.vocab, model.eos_token_ids, accelerator)
    window = model.sliding_window if any(model.sliding_layers) else None
    packer = Packer(machine, rows, window or 0)
    return DeviceRunner(decoder, sampler, packer, shapes, rows, accelerator)


def _trial(setting: Setting, runner: DeviceRunner, progress: Progress) -> None:
    """Runs the largest step over an arena of its own, so that what the libraries take is taken before the real one.

    Kernels are compiled before: the first step to need one would wait for it.
    """
    chunks = setting.geometry.blocks(min(setting.step_tokens, setting.context))
    arena = _arena(setting, chunks)
    bank = _bank(setting, arena)
    runner.use(arena, bank)
    runner.compile(setting.compile_threads, lora=setting.lora, progress=progress)
    plan = largest_step(setting.step_tokens, setting.context, chunks, setting.geometry)
    runner.forward(plan)
    runner.sample(plan).result()
    bank.close()
    runner.use(torch.empty(0), bank)
    del arena, bank
    setting.accelerator.synchronize()
    torch.cuda.empty_cache()


def _arena(setting: Setting, chunks: int) -> Tensor:
    shape = chunks, setting.geometry.chunk_elements
    return torch.zeros(shape, dtype=setting.dtype, device=setting.accelerator.device)


def _bank(setting: Setting, arena: Tensor) -> DeviceBank:
    machine = setting.shapes.machine
    return DeviceBank(
        arena, setting.model.dims, setting.geometry, machine.slots, machine.rank_blocks, setting.accelerator
    )

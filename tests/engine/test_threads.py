"""One thread of the engine computes on several cores; a second team of threads would halve the CPU's speed."""

import asyncio
from pathlib import Path

import torch

from engine.config import EngineConfig
from tests.support.engine import local_engine
from tests.support.models import write_model


async def test_only_the_step_thread_computes_on_several_cores(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = EngineConfig(model_path=str(tmp_path), dtype="float32", max_total_tokens=4096, threads=2)
    async with local_engine(config) as local:
        launcher = local.engine.pipeline._launcher
        assert await asyncio.wrap_future(launcher.submit(torch.get_num_threads)) == 2
        assert await asyncio.to_thread(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 1

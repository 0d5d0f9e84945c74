"""The demo model with each of its adapters on the device, mixed in one batch, against transformers."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from engine.adapters.host import HostAdapter, HostTier
from engine.adapters.peft import AdapterFile, read_adapter
from engine.adapters.spec import AdapterLimits
from engine.models.registry import load_config
from engine.types import SamplingParams
from tests.engine.worker.harness import Driver, Request
from tests.gpu.conftest import Figures
from tests.gpu.judging import assert_right, judge
from tests.gpu.reference import DeviceReference, Weights
from tests.gpu.test_parity import start
from tests.parity.demo import chat_prompts, demo_adapters, demo_folder

TOKENS = 24
QUESTIONS = 8


def weights_of(file: AdapterFile) -> Weights:
    """B with its scale, as the host tier folds it in."""
    scales = {(module.layer, module.module): module.scale for module in file.spec.modules}
    return {place: (pair.a.float(), pair.b.float() * scales[place]) for place, pair in file.pairs.items()}


class Demo:
    """Model, adapters and both references."""

    def __init__(self, folder: Path, device: str = "cuda") -> None:
        self.folder = folder
        dims = load_config(folder).dims
        limits = AdapterLimits(256)
        self.files = {i: read_adapter(path, dims, limits) for i, path in enumerate(demo_adapters().values(), 1)}
        weights = {adapter: weights_of(file) for adapter, file in self.files.items()}
        self.exact, self.peer = (
            DeviceReference(folder, weights, dtype, torch.bfloat16, device) for dtype in (torch.float32, torch.bfloat16)
        )

    @functools.cached_property
    def answers(self) -> list[tuple[list[int], int | None, list[int]]]:
        """(prompt, adapter, what the reference answers), every adapter and the base in turn."""
        pairs = [(prompt, owner) for prompt in chat_prompts(self.folder)[:QUESTIONS] for owner in (None, *self.files)]
        return [(prompt, owner, self.exact.greedy(prompt, owner, TOKENS)) for prompt, owner in pairs]

    def requests(self) -> list[Request]:
        params = SamplingParams(max_tokens=TOKENS, seed=0, temperature=0.0, logprobs=1, prompt_logprobs=0)
        return [Request(prompt, owner, params, force=answer) for prompt, owner, answer in self.answers]


def load_all(driver: Driver, files: dict[int, AdapterFile], tier: HostTier) -> None:
    for adapter, file in files.items():
        pages: HostAdapter = tier.store(adapter, file)
        driver.load(adapter, pages)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(demo_folder())


@pytest.mark.demo
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_demo(demo: Demo, graphs: bool, figures: Figures, request: pytest.FixtureRequest) -> None:
    worker = start(demo.folder, max_total_tokens=60_000, disable_cuda_graph=not graphs, cuda_graph_max_bs=64)
    driver = Driver(worker, slots=8)
    dtype = getattr(torch, worker.info.dtype)
    tier = HostTier(worker.info.dims, worker.info.geometry, dtype, 1 << 30, pinned=True)
    load_all(driver, demo.files, tier)
    requests = driver.run(demo.requests(), (5, 40))
    judgement = judge(requests, demo.exact, demo.peer)
    figures(request.node.name, {**dataclasses.asdict(judgement), "replays": worker.graph_replays})
    worker.close()
    tier.close()
    assert_right(judgement)
    assert (worker.graph_replays > 0) == graphs

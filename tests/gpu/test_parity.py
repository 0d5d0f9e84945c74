"""The worker on the device against transformers: families, adapters of every rank, mixed batches, graphs or not."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from engine.config import EngineConfig
from engine.models import device_decoder
from engine.models.overlap import NEVER, OFF, Overlap
from engine.types import SamplingParams
from engine.worker.worker import Worker
from kernels.large_product import gate_up_silu, product_onto
from tests.engine.worker.harness import Driver, Request, make_pages, random_weights
from tests.gpu.conftest import Figures
from tests.gpu.judging import assert_right, judge
from tests.gpu.reference import DeviceReference, Weights
from tests.support.models import read_dims, write_model

SHAPE: dict[str, Any] = {
    "layers": 3, "hidden": 192, "heads": 6, "kv_heads": 2, "head_dim": 64, "intermediate": 328, "vocab": 500,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 40},
    "qwen2": {"model_type": "qwen2", "sliding_window": 33, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip
EVERY = range(7)
ADAPTERS: tuple[dict[int, int], ...] = (
    {0: 16, 2: 16},  # q, v
    {6: 5},  # down
    dict.fromkeys(EVERY, 1),
    dict.fromkeys(EVERY, 64),
    {0: 100, 3: 100, 4: 16, 6: 8},
    dict.fromkeys(EVERY, 256),
    dict.fromkeys(EVERY, 16),
)
TOKENS = 12


def start(folder: Path, **settings: Any) -> Worker:
    defaults: dict[str, Any] = {
        "max_total_tokens": 200_000, "max_running_requests": 96, "context_length": 512, "enable_lora": True,
        "max_loras_per_batch": 8, "cuda_graph_max_bs": 16,
    }  # fmt: skip
    return Worker.start(EngineConfig(**(defaults | settings)), folder, progress=lambda *_: None)


def weights_of(folder: Path, ranks: Sequence[Mapping[int, int]], scale: float = 0.12) -> dict[int, Weights]:
    dims = read_dims(folder)
    return {i: random_weights(dims, adapter, seed=i, scale=scale) for i, adapter in enumerate(ranks, 1)}


def load(driver: Driver, adapters: Mapping[int, Weights]) -> None:
    info = driver.worker.info
    for adapter, weights in adapters.items():
        driver.load(adapter, make_pages(weights, info.geometry, getattr(torch, info.dtype)))


def forced(
    owners: Sequence[int | None],
    exact: DeviceReference,
    longest: int = 90,
    tokens: int = TOKENS,
    prompt_logprobs: int | None = 0,
    shortest: int = 2,
) -> list[Request]:
    """Requests whose answer is the reference's."""
    draw = random.Random(len(owners))
    requests = []
    for owner in owners:
        prompt = [draw.randrange(3, 480) for _ in range(draw.randint(shortest, longest))]
        params = SamplingParams(max_tokens=tokens, seed=0, temperature=0.0, logprobs=1, prompt_logprobs=prompt_logprobs)
        requests.append(Request(prompt, owner, params, force=exact.greedy(prompt, owner, tokens)))
    return requests


class Case:
    """A checkpoint, its adapters, and transformers in both dtypes."""

    def __init__(self, folder: Path, ranks: Sequence[Mapping[int, int]], **config: Any) -> None:
        self.folder = write_model(folder, dtype=torch.bfloat16, **(SHAPE | config))
        self.adapters = weights_of(self.folder, ranks)
        self.exact, self.peer = (
            DeviceReference(self.folder, self.adapters, dtype, torch.bfloat16)
            for dtype in (torch.float32, torch.bfloat16)
        )

    def driver(self, **settings: Any) -> Driver:
        driver = Driver(start(self.folder, **settings), slots=settings.get("max_loras_per_batch", 8))
        load(driver, self.adapters)
        return driver


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), ADAPTERS, **FAMILIES[request.param])


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_families(case: Case, graphs: bool, figures: Figures, request: pytest.FixtureRequest) -> None:
    driver = case.driver(disable_cuda_graph=not graphs)
    owners = [None, *case.adapters, None, 4, 6, 1, 3]
    requests = driver.run(forced(owners, case.exact), (5, 70))
    judgement = judge(requests, case.exact, case.peer)
    figures(request.node.name, {**dataclasses.asdict(judgement), "replays": driver.worker.graph_replays})
    driver.worker.close()
    assert_right(judgement)
    assert (driver.worker.graph_replays > 0) == graphs


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """64 adapters over one Llama."""
    ranks = [ADAPTERS[i % len(ADAPTERS)] for i in range(64)]
    return Case(tmp_path_factory.mktemp("crowd"), ranks)


@pytest.mark.parametrize("count", [1, 2, 17, 64])
def test_many_adapters_in_a_batch(crowd: Case, count: int, figures: Figures) -> None:
    driver = crowd.driver(max_loras_per_batch=64, cuda_graph_max_bs=80)
    owners: list[int | None] = [*range(1, count + 1), *([None] * 4)]
    judgement = judge(driver.run(forced(owners, crowd.exact, 40, 6), (3, 25)), crowd.exact, crowd.peer)
    figures(f"{count} adapters", dataclasses.asdict(judgement))
    driver.worker.close()
    assert_right(judgement)
    assert driver.worker.graph_replays > 0


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_last_rows(crowd: Case, graphs: bool, figures: Figures, request: pytest.FixtureRequest) -> None:
    """Nobody asks for prompts' log-probabilities: the last layer computes the sampled rows of prompts alone."""
    driver = crowd.driver(disable_cuda_graph=not graphs, max_loras_per_batch=64, max_running_requests=16)
    requests = forced([None, *range(1, 9)], crowd.exact, prompt_logprobs=None)
    judgement = judge(driver.run(requests, (5, 60)), crowd.exact, crowd.peer)
    figures(request.node.name, dataclasses.asdict(judgement))
    runner: Any = driver.worker._runner
    driver.worker.close()
    assert_right(judgement)
    assert any(shape.last_rows for shape in runner._tensors)


@pytest.mark.parametrize(
    ("large", "fill"), [(Overlap().large, 0.0), (Overlap().large, 2.0), (NEVER, 0.0)], ids=["ours", "merged", "beside"]
)
def test_large_steps(
    crowd: Case,
    large: int,
    fill: float,
    figures: Figures,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some 2,500 tokens, most with adapters: products do what follows them, or other kernels do."""
    driver = crowd.driver(max_loras_per_batch=64, chunked_prefill_size=4096)
    runner: Any = driver.worker._runner
    runner._decoder.overlap(Overlap(large=large, fill=fill))
    merged, added, taken = Mock(wraps=gate_up_silu), Mock(wraps=device_decoder.add_product), Mock(wraps=product_onto)
    monkeypatch.setattr(device_decoder, "gate_up_silu", merged)
    monkeypatch.setattr(device_decoder, "add_product", added)
    monkeypatch.setattr(device_decoder, "product_onto", taken)
    requests = forced([None, *range(1, 12)], crowd.exact, 215, 4, prompt_logprobs=None, shortest=205)
    judgement = judge(driver.run(requests), crowd.exact, crowd.peer)
    figures(request.node.name, dataclasses.asdict(judgement))
    driver.worker.close()
    assert_right(judgement)
    assert merged.called == (large != NEVER)
    assert taken.called == (large != NEVER and fill == 0)
    assert added.called == (large != NEVER and fill > 0)


def test_top_of_a_large_arena(crowd: Case, figures: Figures) -> None:
    """Blocks and adapters beyond every 32-bit offset: at the end of all the memory that the card has left."""
    driver = Driver(start(crowd.folder, max_total_tokens=None, mem_fraction_static=0.9), slots=8)
    info = driver.worker.info
    driver.free = list(range(info.num_chunks))  # taken from its end
    few = {adapter: crowd.adapters[adapter] for adapter in range(1, 9)}
    load(driver, few)
    judgement = judge(driver.run(forced([None, *few], crowd.exact), (5, 60)), crowd.exact, crowd.peer)
    size = info.num_chunks * info.geometry.chunk_bytes
    figures("top of the arena", {**dataclasses.asdict(judgement), "arena_bytes": size})
    driver.worker.close()
    assert_right(judgement)
    assert size > 40 << 30


def test_the_librarys_products(crowd: Case, figures: Figures) -> None:
    """The switch of our own: without them the steps are as right, though not to the bit the same."""
    driver = crowd.driver(disable_cuda_graph=True, max_loras_per_batch=64)
    runner: Any = driver.worker._runner
    runner._decoder.overlap(OFF)
    judgement = judge(driver.run(forced([None, *range(1, 9)], crowd.exact), (5, 60)), crowd.exact, crowd.peer)
    figures("the library's products", dataclasses.asdict(judgement))
    driver.worker.close()
    assert_right(judgement)


IN_LINE = Overlap(pdl=False)


@pytest.mark.parametrize(
    ("graphs", "overlap"),
    [(False, Overlap()), (True, IN_LINE), (True, Overlap()), (True, Overlap(first=0)), (True, Overlap(keep=0))],
    ids=["overlapped", "graphs", "overlapped graphs", "shrink behind", "nothing kept"],
)
def test_graphs_and_overlap_change_nothing(crowd: Case, graphs: bool, overlap: Overlap) -> None:
    """The same shapes launched eagerly, one kernel after the other: the same bits."""
    assert sampled(crowd, graphs, overlap) == sampled(crowd, False, IN_LINE)


def sampled(crowd: Case, graphs: bool, overlap: Overlap) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of a batch of base and adapters."""
    driver = crowd.driver(disable_cuda_graph=not graphs, max_loras_per_batch=64)
    runner: Any = driver.worker._runner
    assert runner._decoder._overlap == Overlap(), "on by default"
    runner._decoder.overlap(overlap)
    if graphs:
        with torch.inference_mode():
            runner.capture(lora=True, progress=lambda *_: None)
    params = SamplingParams(max_tokens=16, seed=3, temperature=0.9, top_k=50, top_p=0.95, logprobs=0)
    draw = random.Random(1)
    found = []
    for length in (20, 60):  # together in a graph of a few hundred tokens, and of some more, whose tiles are others
        made = [Request([draw.randrange(480) for _ in range(length)], owner, params) for owner in (None, *range(1, 9))]
        found += [(r.tokens, [p.logprob for p in r.logprobs]) for r in driver.run(made)]
    driver.worker.close()
    return found

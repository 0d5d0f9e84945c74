"""The worker's Triton path against its torch path, float32, tiny models. Run by test_device.py in Triton's interpreter.

Not collected by itself: Triton decides for a whole process whether kernels are interpreted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.types import SamplingParams
from engine.worker.device_start import start_device
from engine.worker.worker import Worker
from tests.engine.worker.harness import GREEDY, Driver, Request, make_pages, random_weights, start
from tests.support.models import write_model

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_total_tokens": 2048,
    "max_running_requests": 12,
    "chunked_prefill_size": 32,
    "context_length": 160,
    "max_loras_per_batch": 4,
    "max_lora_rank": 40,
    "threads": 1,
}
RANKS = ({0: 16, 2: 16}, {6: 5}, dict.fromkeys(range(7), 40), {3: 8, 4: 24, 5: 1})


def start_interpreted(folder: Path, **settings: Any) -> Worker:
    config = EngineConfig(**(SMALL | {"enable_lora": True} | settings))
    return start_device(config, folder, torch.device("cpu"), lambda *_: None)


def drivers(folder: Path, **settings: Any) -> tuple[Driver, Driver]:
    """(Triton, torch), the same adapters in both."""
    made = Driver(start_interpreted(folder, **settings)), Driver(start(folder, **(SMALL | settings)))
    for driver in made:
        info = driver.worker.info
        for index, ranks in enumerate(RANKS):
            weights = random_weights(info.dims, ranks, seed=index)
            driver.load(index + 1, make_pages(weights, info.geometry, torch.float32))
    return made


def requests(owners: Sequence[int | None], length: int = 9, tokens: int = 4, **params: Any) -> list[Request]:
    generator = torch.Generator().manual_seed(len(owners))
    settings = {"max_tokens": tokens, "seed": 7, "temperature": 0.0, "logprobs": 0} | params
    prompts = [torch.randint(3, 200, (1 + 5 * i % length,), generator=generator).tolist() for i in range(len(owners))]
    return [
        Request(prompt, owner, SamplingParams(**settings), choice=i)
        for i, (prompt, owner) in enumerate(zip(prompts, owners, strict=True))
    ]


def assert_same(ours: list[Request], theirs: list[Request]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.tokens == other.tokens
        for field in ("logprobs", "prompt_logprobs"):
            for told, wanted in zip(getattr(mine, field), getattr(other, field), strict=True):
                assert (told.token, told.rank) == (wanted.token, wanted.rank)
                assert told.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert [t for t, _ in told.top] == [t for t, _ in wanted.top]


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"heads": 6, "head_dim": 20, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Mixed steps of base and adapters: chunks of prompts beside decodes, in the same tokens and log-probabilities."""
    folder = write_model(tmp_path / family, vocab=250, **FAMILIES[family])
    triton, torch_ = drivers(folder)
    owners = (None, 1, 2, 3, 4)
    ours, theirs = (d.run(requests(owners, 23, logprobs=2, prompt_logprobs=1), (6, 6)) for d in (triton, torch_))
    assert_same(ours, theirs)
    assert triton.worker.lora_steps["triton"] > 3
    assert triton.worker.graph_replays == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), vocab=250)


def test_sampling(folder: Path) -> None:
    """Every setting, mixed with greedy rows; the noise makes both draw alike."""
    settings: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 0.7, "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {"logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 3, "stop_token_ids": (5, 7)},
        {"temperature": 2.0},
    )

    def made() -> list[Request]:
        return [requests([None] * len(settings), tokens=5, **given)[i] for i, given in enumerate(settings)]

    ours, theirs = (driver.run(made()) for driver in drivers(folder))
    assert_same(ours, theirs)


def test_force_and_masks(folder: Path) -> None:
    ours, theirs = (
        driver.run([Request([5, 6, 7], 3, GREEDY, force=list(range(40, 56)))]) for driver in drivers(folder)
    )
    assert ours[0].tokens == list(range(40, 56))
    assert_same(ours, theirs)


def test_reused_chunks_and_slots(folder: Path) -> None:
    """An adapter that leaves and comes back to other chunks and slots is itself again; freed memory is full of NaN."""
    triton, torch_ = drivers(folder)
    before = triton.run(requests([3, 1]))
    for driver in (triton, torch_):
        driver.worker.drop(3)
        driver.slots = [None, 2, None, None]
        info = driver.worker.info
        driver.load(3, make_pages(random_weights(info.dims, RANKS[2], seed=2), info.geometry, torch.float32))
    after, wanted = (driver.run(requests([3, 1])) for driver in (triton, torch_))
    assert_same(after, wanted)
    assert_same(after, before)

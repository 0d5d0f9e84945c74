"""The worker's Triton path against its torch path, float32, tiny models. Run by test_device.py in Triton's interpreter.

Not collected by itself: Triton decides for a whole process whether kernels are interpreted.
"""

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from msgspec.structs import replace

from engine.config import EngineConfig, LoraPath
from engine.models import device_decoder, overlap
from engine.models.overlap import OFF
from engine.models.weights import Progress
from engine.plan import StepPlan
from engine.types import SamplingParams
from engine.worker.device_start import start_device
from engine.worker.shapes import Shapes
from engine.worker.worker import Worker
from kernels import lora_meta
from kernels.attention_decode import decode_attention
from kernels.large_product import gate_up_silu, product_onto
from kernels.lora_shrink import lora_shrink
from tests.engine.worker.harness import GREEDY, Driver, Request, make_pages, random_weights, start
from tests.support.adapters import write_adapter
from tests.support.engine import local_engine
from tests.support.models import write_model

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_total_tokens": 2048,
    "max_running_requests": 6,  # at most half of 16 tokens: samples leave the other rows behind
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


def with_adapters(worker: Worker) -> Driver:
    driver, info = Driver(worker), worker.info
    for index, ranks in enumerate(RANKS):
        weights = random_weights(info.dims, ranks, seed=index)
        driver.load(index + 1, make_pages(weights, info.geometry, torch.float32))
    return driver


def drivers(folder: Path, **settings: Any) -> tuple[Driver, Driver]:
    """(Triton, torch), the same adapters in both."""
    ours, theirs = start_interpreted(folder, **settings), start(folder, **(SMALL | settings))
    return with_adapters(ours), with_adapters(theirs)


def requests(owners: Sequence[int | None], tokens: int = 2, **params: Any) -> list[Request]:
    """Prompts of 3 to 11 tokens."""
    draw = random.Random(len(owners))
    settings = {"max_tokens": tokens, "seed": 7, "temperature": 0.0, "logprobs": 0} | params
    return [
        Request([draw.randrange(3, 200) for _ in range(3 + 4 * i % 9)], owner, SamplingParams(**settings), choice=i)
        for i, owner in enumerate(owners)
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
    "mistral": {"model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": True, "heads": 6, "head_dim": 20},
    "qwen2": {"model_type": "qwen2", "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
}
GREEDY_FEW = replace(GREEDY, max_tokens=3)
SLOW = pytest.mark.slow
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name == "qwen3" else SLOW) for name in FAMILIES])
def test_families(family: str, tmp_path: Path) -> None:
    """Mixed steps of base and adapters: chunks of prompts beside decodes, in the same tokens and log-probabilities."""
    folder = write_model(tmp_path / family, vocab=250, layers=1 if family == "qwen3" else 2, **FAMILIES[family])
    triton, torch_ = drivers(folder)
    ours, theirs = (d.run(requests((None, 2, 3), logprobs=2, prompt_logprobs=1), (5, 5)) for d in (triton, torch_))
    assert_same(ours, theirs)
    assert triton.worker.lora_steps["triton"] > 2
    assert triton.worker.graph_replays == 0


@pytest.mark.parametrize(  # with biases and without; o and down ours, or the library's behind expand
    ("family", "fill"),
    [pytest.param("qwen2", 0.0, marks=SLOW), ("qwen3", 0.0), pytest.param("qwen3", 2.0, marks=SLOW)],
)
def test_products_do_what_follows(family: str, fill: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of mostly adapters, of few, and of adapters that have none of most groups of modules."""
    folder = write_model(tmp_path / family, vocab=250, **FAMILIES[family])
    monkeypatch.setattr(lora_meta, "LARGE_TOKENS", 8)
    triton, torch_ = drivers(folder)
    cast("Any", triton.worker._runner)._decoder.overlap(dataclasses.replace(OFF, large=8, widest=4, fill=fill))
    merged, added, taken = Mock(wraps=gate_up_silu), Mock(wraps=device_decoder.add_product), Mock(wraps=product_onto)
    monkeypatch.setattr(device_decoder, "gate_up_silu", merged)
    monkeypatch.setattr(device_decoder, "add_product", added)
    monkeypatch.setattr(device_decoder, "product_onto", taken)
    for owners in ((1, 3, 4, None), (None, None, None, 3), (2, 2)):
        ours, theirs = (driver.run(requests(owners)) for driver in (triton, torch_))
        assert_same(ours, theirs)
    assert {call.args[4] is None for call in merged.call_args_list} == {True, False}
    assert added.called
    assert taken.called == (fill == 0)


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
def test_own_products(tmp_path: Path) -> None:
    """Of steps whose adapters have some groups of modules and not others."""
    folder = write_model(tmp_path / "qwen2", vocab=250, layers=1, **FAMILIES["qwen2"])
    triton, torch_ = drivers(folder)
    cast("Any", triton.worker._runner)._decoder.overlap(dataclasses.replace(OFF, products=8, widest=4))
    for owners in ((1, 1, None), (None, 2), (3, 4)):
        ours, theirs = (driver.run(requests(owners)) for driver in (triton, torch_))
        assert_same(ours, theirs)


@pytest.mark.parametrize(("modules", "adapters"), [(("q_proj", "v_proj"), (1,)), (("down_proj",), (2,))], ids=str)
def test_modules_that_no_adapter_may_have(
    modules: tuple[str, ...], adapters: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is launched for their groups."""
    folder = write_model(tmp_path / "llama", vocab=250, layers=2)
    launched = Mock(wraps=lora_shrink)
    monkeypatch.setattr(device_decoder, "lora_shrink", launched)
    triton, torch_ = drivers(folder, lora_target_modules=modules)
    launched.reset_mock()
    ours, theirs = (driver.run(requests((*adapters, None))) for driver in (triton, torch_))
    assert_same(ours, theirs)
    assert {call.args[4].index for call in launched.call_args_list} == {0 if "q_proj" in modules else 3}


@pytest.mark.parametrize("each", [pytest.param(0, marks=SLOW), 2])
def test_decodes_beside_prompts(each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a second stream or behind; where nobody decodes nothing is launched."""
    folder = write_model(tmp_path / "llama", vocab=250, layers=1)
    monkeypatch.setattr(overlap, "MANY_DECODES", 2)
    triton, torch_ = drivers(folder)
    cast("Any", triton.worker._runner)._decoder.overlap(dataclasses.replace(OFF, large=4, decodes_each=each))
    launched = Mock(wraps=decode_attention)
    monkeypatch.setattr(device_decoder, "decode_attention", launched)
    driven = (
        triton.run(requests((None, 2, None, 3), tokens=4), (3, 6)),
        torch_.run(requests((None, 2, None, 3), tokens=4), (3, 6)),
    )
    assert_same(*driven)
    assert {call.kwargs.get("each", 0) for call in launched.call_args_list} == {0, each}
    launched.reset_mock()
    triton.run(requests((None, 2), tokens=1))
    assert not launched.called


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), vocab=250, layers=1, rope_scaling=LLAMA3_ROPE)


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
        return [requests([None] * len(settings), tokens=4, **given)[i] for i, given in enumerate(settings)]

    ours, theirs = (driver.run(made(), (5, 5)) for driver in drivers(folder))
    assert_same(ours, theirs)


def watch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, torch.Tensor]]:
    """Of each step: whether its last layer held rows of samples alone, and the samples' logits."""
    seen = list[tuple[bool, torch.Tensor]]()
    forward, runner = driver.worker.forward, cast("Any", driver.worker._runner)

    def launch(plan: StepPlan) -> None:
        forward(plan)
        flight = runner._flight
        seen.append((flight.shape.last_rows, runner._sampler.logits[: len(flight.packed.steps)].clone()))

    monkeypatch.setattr(driver.worker, "forward", launch)
    return seen


@pytest.mark.parametrize(
    ("layers", "owners"),
    [
        pytest.param(2, (None,) * 5, marks=SLOW, id="base"),
        pytest.param(1, (None, 1, 1, None, None), id="one adapter"),
        pytest.param(2, (None, 1, 2, 3, 4), marks=SLOW, id="adapters"),
    ],
)
def test_last_rows(
    layers: int, owners: tuple[int | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of prompts, alone at first and then beside decodes: the logits of samples need no other row."""
    folder = write_model(tmp_path / "model", vocab=250, layers=layers)
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 200) for _ in range(length)] for length in (9, 5, 13, 6, 10)]
    answers, steps = [], []
    for last_rows in (True, False):
        driver = with_adapters(start_interpreted(folder))
        runner: Any = driver.worker._runner
        runner._shapes = Shapes(runner._shapes.machine, None, last_rows=last_rows)
        steps.append(watch(driver, monkeypatch))
        made = [Request(prompt, owner, GREEDY_FEW) for prompt, owner in zip(prompts, owners, strict=True)]
        told = [Request(prompts[0], owners[1], replace(GREEDY_FEW, prompt_logprobs=1))]  # these steps need all rows
        answers.append([*driver.run(made, (4, 4)), *driver.run(told)])
    assert_same(*answers)
    ours, theirs = steps
    for (_, mine), (last_rows, other) in zip(ours, theirs, strict=True):
        assert not last_rows
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert [len(logits) for last_rows, logits in ours if last_rows] == [0, 2, 4]
    assert len(answers[0][-1].prompt_logprobs) == len(prompts[0]) - 1


def test_force_and_slots(folder: Path) -> None:
    """Every kind of adapter, its tokens forced; then one that left and came back to other chunks and another slot."""
    forced = [40, 41]
    triton, torch_ = drivers(folder)

    def made() -> list[Request]:
        params = replace(GREEDY, max_tokens=len(forced))
        return [Request([5, 6, 7], owner, params, force=forced) for owner in (3, 4)]

    before, wanted = (driver.run(made()) for driver in (triton, torch_))
    assert before[0].tokens == forced
    assert_same(before, wanted)
    triton.worker.drop(3)
    triton.slots = [3, 2, None, None]
    info = triton.worker.info
    triton.load(3, make_pages(random_weights(info.dims, RANKS[2], seed=2), info.geometry, torch.float32))
    assert_same(triton.run(made()), before)


def _start_on_the_cpu(config: EngineConfig, folder: Path, *, progress: Progress) -> Worker:
    return start_device(config, folder, torch.device("cpu"), progress)


async def test_engine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole engine over the Triton path, one step ahead: loads, a stream of base and adapters, the same answers."""
    for rank in (5, 24):
        write_adapter(tmp_path / f"lora{rank}", folder, rank=rank, std=0.5, seed=rank)
    paths = [LoraPath(name=name, path=str(tmp_path / name)) for name in ("lora5", "lora24")]
    settings = SMALL | {"max_lora_rank": None, "model_path": str(folder), "lora_paths": tuple(paths)}
    params = SamplingParams(max_tokens=3, seed=0, temperature=0.0, ignore_eos=True, logprobs=0)
    answers = []
    for interpreted in (True, False):
        if interpreted:
            monkeypatch.setattr(Worker, "start", _start_on_the_cpu)
        async with local_engine(EngineConfig(**settings)) as local:
            asked = (local.ask([7, 8, 9, 10], params, adapter=name) for name in (None, "lora5", "lora24", None))
            answers.append([answer for (answer,) in await asyncio.gather(*asked)])
        monkeypatch.undo()
    for ours, wanted in zip(*answers, strict=True):
        assert ours.tokens == wanted.tokens
        assert [t.logprob for t in ours.logprobs] == pytest.approx([t.logprob for t in wanted.logprobs], abs=1e-4)
    assert len({tuple(answer.tokens) for answer in answers[0]}) > 1

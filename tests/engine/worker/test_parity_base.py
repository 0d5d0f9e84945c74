"""The worker against transformers in float32, base only: prefill, chunks, decode, mixed batches, shared blocks."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from engine.types import TokenLogprob
from tests.engine.worker.harness import GREEDY, Driver, Request, start, tiny_llama

TOLERANCE = 1e-3


def prompts(count: int, longest: int, vocab: int = 211, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def assert_matches(model: LlamaForCausalLM, request: Request) -> None:
    """Each token is the reference's argmax given those before it, with the reference's log-probability."""
    ids = torch.tensor([request.prompt + request.tokens])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)[len(request.prompt) - 1 : -1]
    best = logprobs.topk(2, -1)
    for position, (token, told) in enumerate(zip(request.tokens, request.logprobs, strict=True)):
        near = best.values[position, 0] - best.values[position, 1] < TOLERANCE
        assert near or token == best.indices[position, 0]
        assert told.logprob == pytest.approx(logprobs[position, token].item(), abs=TOLERANCE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_llama(folder), folder


@pytest.mark.parametrize("chunk", [(1000, 1000), (2, 17), (1, 1)])
def test_mixed_batch_matches_transformers(tiny: tuple[LlamaForCausalLM, Path], chunk: tuple[int, int]) -> None:
    model, folder = tiny
    requests = [Request(p) for p in prompts(9, 90)]
    for request in Driver(start(folder)).run(requests, chunk):
        assert_matches(model, request)


def test_long_prompt_attends_in_slabs(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    (request,) = Driver(start(folder)).run([Request(prompts(1, 1, seed=3)[0] * 400)])
    assert_matches(model, request)


def test_shared_prefix_blocks(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    driver, prompt = Driver(start(folder)), prompts(1, 1, seed=5)[0] * 70
    (first,) = driver.run([Request(prompt)], poison=False)
    (second,) = driver.run([Request([*prompt, 7, 8, 9], cached=first)])
    assert second.computed > len(second.prompt)
    assert second.blocks[:4] == first.blocks[:4]
    assert_matches(model, second)


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "one KV head": {"num_key_value_heads": 1, "num_attention_heads": 3},
    "no grouping": {"num_key_value_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path: Path, name: str) -> None:
    model = tiny_llama(tmp_path, seed=1, **VARIANTS[name])
    if name == "biases":
        for key, tensor in model.state_dict().items():
            if key.endswith("bias"):
                tensor.normal_(0.0, 0.5)
        model.save_pretrained(tmp_path)
    for request in Driver(start(tmp_path)).run([Request(p) for p in prompts(3, 100)], (5, 40)):
        assert_matches(model, request)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (request,) = Driver(start(tmp_path)).run([Request([3, 4, 5])])
    assert_matches(model, request)


def test_prompt_logprobs(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    params = msgspec.structs.replace(GREEDY, prompt_logprobs=3, max_tokens=1)
    requests = [Request(p, params=params) for p in prompts(4, 150, seed=2)]
    for request in Driver(start(folder)).run([replace(r) for r in requests], (3, 50)):
        with torch.no_grad():
            logprobs = model(torch.tensor([request.prompt])).logits[0].log_softmax(-1)
        assert [told.token for told in request.prompt_logprobs] == request.prompt[1:]
        for position, told in enumerate(request.prompt_logprobs):
            assert_told(told, logprobs[position])


def assert_told(told: TokenLogprob, logprobs: torch.Tensor) -> None:
    assert told.logprob == pytest.approx(logprobs[told.token].item(), abs=TOLERANCE)
    assert told.rank == pytest.approx((logprobs > logprobs[told.token]).sum().item() + 1, abs=1)
    assert [value for _, value in told.top] == pytest.approx(logprobs.topk(3).values.tolist(), abs=TOLERANCE)


def test_forced_tokens(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    """Teacher forcing: the sequence goes the forced way, log-probabilities are the model's."""
    model, folder = tiny
    forced = prompts(1, 1, seed=9)[0] * 16
    (request,) = Driver(start(folder)).run([Request([5, 6, 7], force=forced)])
    assert request.tokens == forced
    with torch.no_grad():
        logprobs = model(torch.tensor([[5, 6, 7, *forced]])).logits[0].log_softmax(-1)[2:-1]
    told = [told.logprob for told in request.logprobs]
    assert told == pytest.approx(logprobs[range(16), forced].tolist(), abs=TOLERANCE)

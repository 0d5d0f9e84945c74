"""What the ranges of the fields allow, at their ends: every request is answered, and the engine outlives them all."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Files
from tests.e2e.server import figures, generate, load, unload
from tests.support.adapters import write_adapter

VOCAB = 256
BODY: dict[str, Any] = {"model": "llama:lora0", "prompt": "hello", "max_tokens": 4}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "no temperature to speak of": {"temperature": 1e-300},
    "a temperature that float32 does not know": {"temperature": 1e-46},
    "the largest temperature": {"temperature": 2},
    "no nucleus to speak of": {"top_p": 1e-300},
    "an empty nucleus": {"top_p": 0},
    "a huge top_k": {"top_k": 2**63 - 1},
    "min_p of 1": {"min_p": 1},
    "everything at once": {"top_p": 1e-9, "min_p": 1, "top_k": 1, "temperature": 1e-9},
    "penalties": {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 100},
    "no repetition penalty to speak of": {"repetition_penalty": 1e-300},
    "a small repetition penalty": {"repetition_penalty": 1e-30},
    "seeds": {"seed": -(2**63)},
    "a bias against everything": {"logit_bias": {str(i): -100 for i in range(VOCAB)}},
    "a bias for everything": {"logit_bias": {str(i): 100 for i in range(VOCAB)}},
    "nothing but stop tokens": {"stop_token_ids": list(range(VOCAB))},
    "nothing but stop tokens, banned": {"stop_token_ids": list(range(VOCAB)), "min_tokens": 3},
    "long stop strings": {"stop": ["x" * 512] * 32},
    "many log-probabilities": {"logprobs": 20, "echo": True, "temperature": 1e-300},
    "no tokens": {"max_tokens": 0},
    "no tokens but the prompt's": {"max_tokens": 0, "echo": True, "logprobs": 1},
    "many choices": {"n": 128},
    "many prompts": {"prompt": [[5]] * 2048, "max_tokens": 1},
    "a full context": {"prompt": [7] * 2047, "max_tokens": 1, "echo": True, "logprobs": 5},
    "special tokens and NUL": {"prompt": "<|im_end|>\0<|endoftext|>\U0001f600"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", SAMPLINGS)
async def test_an_extreme_request(client: httpx.AsyncClient, what: str, stream: bool) -> None:
    response = await client.post("/v1/completions", json=BODY | SAMPLINGS[what] | {"stream": stream})
    assert response.status_code == 200, response.text
    if stream:
        *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert done == "[DONE]"
        assert not any("error" in json.loads(event) for event in events)
    await engine_lives(client)


async def test_extreme_native_requests(client: httpx.AsyncClient) -> None:
    for sampling in (
        {"temperature": 1e-300, "n": 64},
        {"temperature": 100, "min_p": 1e-300},
        {"stop_token_ids": list(range(VOCAB)), "min_new_tokens": 2},
        {"max_new_tokens": 0},
    ):
        body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 3} | sampling, "lora_path": ["lora1", None]}
        logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 20}
        response = await client.post("/generate", json=body | logprobs | {"return_text_in_logprobs": True})
        assert response.status_code == 200, response.text
    await engine_lives(client)


@pytest.mark.parametrize("scale", [1e10, 1e30])
async def test_an_adapter_whose_answers_are_no_numbers(
    client: httpx.AsyncClient, files: Files, tmp_path: Path, scale: float
) -> None:
    """Its weights are finite, what they make is not: it spoils its own answers alone."""
    folder = write_adapter(tmp_path / "huge", files.model, rank=4)
    path = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, scale) for name, tensor in load_file(path).items()}, path)
    before = await generate(client, "hello", "lora0")
    await load(client, "huge", folder)
    try:
        for sampling in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.5, "top_k": 5}):
            body = {"text": "hello", "lora_path": "huge", "sampling_params": sampling | {"max_new_tokens": 4}}
            response = await client.post("/generate", json=body | {"return_logprob": True})
            assert response.status_code == 200, response.text
            together = [await generate(client, ["hello", "hello"], ["huge", "lora0"])]
            assert together[0][1] == before
        await engine_lives(client)
    finally:
        await unload(client, "huge")
    assert await generate(client, "hello", "lora0") == before


async def engine_lives(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await figures(client))("engine_losses_total") == 0

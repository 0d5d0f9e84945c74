"""Defaults, limits and the context: from a request's fields to what the engine samples with."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.types import SamplingParams
from gateway.errors import ApiError
from gateway.protocol.chat import ChatRequest
from gateway.protocol.parse import parse
from gateway.sampling import draw_seed, fit_max_tokens, sampling_params
from tests.gateway.fake_engine import FakeEngine, model_info
from tests.gateway.harness import FakeSettings, make_gateway
from tests.gateway.tokenizer_files import write_folder

CHECKPOINT = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "min_p": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def params(folder: Path, defaults: str = "model", **fields: Any) -> SamplingParams:
    engine = FakeEngine(model_info(generation_defaults=CHECKPOINT))
    gateway = make_gateway(engine, folder, FakeSettings(sampling_defaults=defaults))
    body = {"model": "llama", "messages": [{"role": "user", "content": "x"}], **fields}
    return sampling_params(gateway, parse(json.dumps(body).encode(), ChatRequest), max_tokens=8)


def test_the_checkpoints_defaults(folder: Path) -> None:
    got = params(folder)
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty) == (0.6, 0.9, 20, 0.0, 1.05)


def test_openais_defaults(folder: Path) -> None:
    got = params(folder, "openai")
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty) == (1.0, 1.0, 0, 0.0, 1.0)


def test_what_is_given_wins_and_null_is_not_given(folder: Path) -> None:
    got = params(folder, temperature=0, top_p=None, top_k=-1)
    assert (got.temperature, got.top_p, got.top_k) == (0.0, 0.9, 0)


def test_an_empty_nucleus_is_the_likeliest_token(folder: Path) -> None:
    got = params(folder, top_p=0)
    assert (got.top_p, got.top_k) == (1.0, 1)


def test_everything_else_is_handed_on(folder: Path) -> None:
    got = params(
        folder,
        seed=-1,
        logit_bias={"5": -100, "007": 1},
        stop_token_ids=[3, 3],
        min_tokens=2,
        ignore_eos=True,
        presence_penalty=1,
        frequency_penalty=-1,
        min_p=0.1,
    )
    assert got.seed == 2**63 - 1
    assert got.logit_bias == {5: -100.0, 7: 1.0}
    assert (got.stop_token_ids, got.min_tokens, got.ignore_eos) == ((3,), 2, True)
    assert (got.presence_penalty, got.frequency_penalty, got.min_p) == (1.0, -1.0, 0.1)


def test_seeds() -> None:
    assert draw_seed(7) == 7
    assert draw_seed(None) != draw_seed(None)
    assert all(0 <= draw_seed(seed) < 2**63 for seed in (None, -1, -(2**63), 2**63 - 1))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"min_tokens": 9}, "min_tokens"),
    ],
)
def test_values_beyond_the_model_are_refused(folder: Path, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        params(folder, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("prompt", "asked", "default", "expected"),
    [
        (10, None, None, 90),
        (10, None, 16, 16),
        (90, None, 16, 10),
        (99, None, 16, 1),
        (10, 90, 16, 90),
        (100, 0, 16, 0),
    ],
)
def test_what_the_context_leaves(prompt: int, asked: int | None, default: int | None, expected: int) -> None:
    assert fit_max_tokens(model_info(max_model_len=100), prompt, asked, default) == expected


@pytest.mark.parametrize(
    ("prompt", "asked", "figures"),
    [(10, 91, ("101", "10", "91")), (100, None, ("101", "100")), (150, 5, ("155", "150", "5"))],
)
def test_what_does_not_fit_is_told_with_all_figures(prompt: int, asked: int | None, figures: tuple[str, ...]) -> None:
    with pytest.raises(ApiError) as caught:
        fit_max_tokens(model_info(max_model_len=100), prompt, asked)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert all(figure in caught.value.message for figure in ("100", *figures))

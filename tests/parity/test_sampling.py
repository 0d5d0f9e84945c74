"""Sampling end to end: tokens of whole engines against a plain reference over the reference's logits."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from engine.types import FinishReason, SamplingParams
from engine.worker import sampler
from engine.worker.noise import uniform
from tests.parity import sampling
from tests.parity.judge import Ask
from tests.parity.zoo import Zoo, prompts
from tests.support.engine import Answer, local_engine
from tests.support.models import EOS_TOKEN

OWNERS = (None, "five", "sixteen", "patterns")
PLAIN = SamplingParams(max_tokens=20, seed=0, temperature=1.0, ignore_eos=True)
STOPS = tuple(range(20, 140))

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top-p": {"top_p": 0.6},
    "top-k": {"top_k": 5},
    "min-p": {"min_p": 0.2},
    "all filters": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.8, "temperature": 0.0},
    "repetition below one": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.5, "temperature": 0.0},
    "frequency": {"frequency_penalty": 0.9, "temperature": 0.0},
    "all penalties": {"presence_penalty": -0.5, "frequency_penalty": 1.1, "repetition_penalty": 1.3, "top_p": 0.9},
    "bias": {"logit_bias": {7: 4.0, 8: 3.5, 9: -100.0}},
    "banned stops": {"stop_token_ids": STOPS, "min_tokens": 12, "ignore_eos": False},
}


def asks(seed: int = 0) -> list[Ask]:
    texts = prompts(len(FEATURES), 3, 30, seed=seed)
    return [
        Ask(prompt, OWNERS[i % len(OWNERS)], msgspec.structs.replace(PLAIN, seed=100 * seed + i, **changes), 1 + i % 3)
        for i, (prompt, changes) in enumerate(zip(texts, FEATURES.values(), strict=True))
    ]


async def together(zoo: Zoo, work: Sequence[Ask], **settings: Any) -> tuple[list[list[Answer]], dict[str, int]]:
    async with local_engine(zoo.config([o for o in OWNERS if o], **settings)) as engine:
        sent = (engine.ask(ask.prompt, ask.params, adapter=ask.adapter, n=ask.n) for ask in work)
        return list(await asyncio.gather(*sent)), (await engine.stats()).counters


def wrong(zoo: Zoo, work: Sequence[Ask], answers: Sequence[Sequence[Answer]]) -> list[str]:
    found, near, positions = list[str](), 0, 0
    for ask, choices in zip(work, answers, strict=True):
        faults, close, count = sampling.faults(zoo.reference, ask, choices)
        found, near, positions = found + faults, near + close, positions + count
    assert near <= 0.01 * positions
    assert positions > 200
    return found


async def test_every_feature(zoo: Zoo) -> None:
    work = asks()
    answers, counters = await together(zoo, work)
    assert wrong(zoo, work, answers) == []
    assert counters["mixed_adapter_steps"] > 0
    for choices in answers:
        assert len({tuple(answer.tokens) for answer in choices}) in (1, len(choices))
    drawn = [choices for ask, choices in zip(work, answers, strict=True) if ask.n > 1 and ask.params.temperature >= 1]
    assert drawn
    assert all(len({tuple(answer.tokens) for answer in choices}) == len(choices) for choices in drawn)


async def test_after_preemption(zoo: Zoo) -> None:
    """Counts of penalties and the noise's counter go on where they were."""
    work = [Ask(a.prompt, a.adapter, msgspec.structs.replace(a.params, max_tokens=60), a.n) for a in asks(seed=2)]
    answers, counters = await together(zoo, work, context_length=96, max_total_tokens=2100)
    assert wrong(zoo, work, answers) == []
    assert counters["resumptions"] > 0


async def test_a_seed_gives_the_same_whatever_shares_the_batch(zoo: Zoo) -> None:
    work = asks(seed=1)
    beside = [Ask(p, None, PLAIN) for p in prompts(9, 5, 70, seed=5)]
    among, _ = await together(zoo, [*beside, *work], chunked_prefill_size=40)
    alone = [(await together(zoo, [ask]))[0][0] for ask in work[::4]]
    assert [[a.tokens for a in choices] for choices in among[len(beside) :: 4]] == [
        [a.tokens for a in choices] for choices in alone
    ]


async def test_endings(zoo: Zoo) -> None:
    """End tokens, stop ids, min_tokens, ignore_eos, and max_tokens 0."""
    bias = {EOS_TOKEN: 9.0}
    (prompt,) = prompts(1, 9, 9)
    cases: dict[str, dict[str, Any]] = {
        "end token": {"logit_bias": bias, "ignore_eos": False},
        "ignored": {"logit_bias": bias},
        "ignored but a stop id": {"logit_bias": bias, "stop_token_ids": (EOS_TOKEN,)},
        "not before": {"logit_bias": bias, "ignore_eos": False, "min_tokens": 7},
        "stop ids": {"stop_token_ids": STOPS},
        "nothing": {"max_tokens": 0, "prompt_logprobs": 1},
    }
    work = [Ask(prompt, None, msgspec.structs.replace(PLAIN, **changes)) for changes in cases.values()]
    answers, _ = await together(zoo, work)
    got = {name: choices[0] for name, choices in zip(cases, answers, strict=True)}
    for name in ("end token", "ignored but a stop id", "not before"):
        assert got[name].finish is FinishReason.STOP
        assert got[name].tokens.index(EOS_TOKEN) == len(got[name].tokens) - 1
    assert len(got["not before"].tokens) > 7
    assert got["ignored"].finish is FinishReason.LENGTH
    assert EOS_TOKEN in got["ignored"].tokens[:-1]
    assert got["stop ids"].finish is FinishReason.STOP
    assert [token in STOPS for token in got["stop ids"].tokens] == [False] * (len(got["stop ids"].tokens) - 1) + [True]
    assert got["nothing"].tokens == []
    assert len(got["nothing"].prompt_logprobs) == len(prompt)


def _no_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "has_penalties", lambda params: False)


def _no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, choice, index: uniform(seed, choice, 0))


def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, choice, index: uniform(seed, 0, index))


def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, choice, index: uniform(0, choice, index))


def _no_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.worker.draw.threshold", lambda probs, params: probs.amin(-1))


@pytest.mark.parametrize("mutate", [_no_penalties, _no_counter, _no_choice, _no_seed, _no_filters])
async def test_mutations_are_seen(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, mutate: Any) -> None:
    mutate(monkeypatch)
    work = asks()
    answers, _ = await together(zoo, work)
    assert wrong(zoo, work, answers)

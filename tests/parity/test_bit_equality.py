"""What a request gets is the same to the last bit, whatever is computed beside it and however its prompt was cut.

In the default dtype, bfloat16 where the CPU multiplies it natively, and in float32. Tokens and log-probabilities are
compared exactly. In float32 attention's products choose their kernels by shape, so that a prompt which was cut may get
other bits: those are counted, and few. There a sequence that gave way may get other bits from then on, since a single
token's products are of another kernel than a prompt's: log-probabilities within TOLERANCE, and the same tokens, but
where draws are from the whole vocabulary: of its many shares below TOLERANCE one may be drawn in place of another.
"""

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.config import EngineConfig, LoraPath
from engine.geometry import make_geometry
from engine.layers.linear import cpu_has_bfloat16
from engine.roster import Roster
from engine.sequence import Sequence as Started
from engine.types import SamplingParams
from tests.parity.demo import cut_demo, demo_adapters, demo_folder, random_adapters, text_prompts
from tests.parity.judge import TOLERANCE, Ask
from tests.parity.runs import Run, run, shuffled
from tests.support.engine import Answer
from tests.support.models import read_dims

GREEDY = SamplingParams(max_tokens=8, seed=1, temperature=0.0, ignore_eos=True, logprobs=2)
SEEDED = msgspec.structs.replace(GREEDY, temperature=0.9, top_p=0.95, top_k=200)
OTHER = msgspec.structs.replace(GREEDY, temperature=1.3, presence_penalty=0.5)


def equal(a: Answer, b: Answer) -> bool:
    return (a.tokens, a.logprobs, a.prompt_logprobs) == (b.tokens, b.logprobs, b.prompt_logprobs)


def close(a: Answer, b: Answer) -> bool:
    """Log-probabilities within TOLERANCE up to the first other token, those it was drawn from among them."""
    shared = same_tokens(a, b)
    return _values(a, shared) == pytest.approx(_values(b, shared), abs=TOLERANCE)


def same_tokens(a: Answer, b: Answer) -> int:
    """How many are the same from the first on."""
    pairs = zip(a.tokens, b.tokens, strict=True)
    return next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(a.tokens))


def _values(answer: Answer, count: int) -> list[float]:
    """Of the prompt and the first `count` tokens, and of what was likeliest for the next."""
    entries = [entry for entry in [*answer.logprobs[:count], *answer.prompt_logprobs] if entry is not None]
    tops = [top for entry in [*entries, *answer.logprobs[count : count + 1]] for top in entry.top]
    return [*(entry.logprob for entry in entries), *(value for _, value in tops)]


@dataclass(frozen=True)
class Model:
    folder: Path
    adapters: dict[str, Path]
    asks: tuple[Ask, ...]  # those that are compared
    others: tuple[Ask, ...]  # sent beside them, of other lengths
    alone: Run  # of `asks`, one after the other, without a prefix cache
    dtype: str

    def config(self, **settings: Any) -> EngineConfig:
        return config(self.folder, self.adapters, dtype=self.dtype, **settings)

    @property
    def narrow(self) -> bool:
        """Whether it runs in bfloat16."""
        return self.dtype == "auto" and cpu_has_bfloat16()

    @property
    def most_cut(self) -> int:
        """How many requests may differ when prompts are cut."""
        return 0 if self.narrow else len(self.asks) // 16

    @property
    def few_tokens(self) -> int:
        """An arena in which not nearly all of the requests can run at once."""
        dims = read_dims(self.folder)
        geometry = make_geometry(dims, torch.bfloat16.itemsize if self.narrow else torch.float32.itemsize)
        return 640 + geometry.block_tokens * geometry.adapter_chunks(dims, 64)

    def differing(self, done: Run, but: Collection[int] = ()) -> list[str]:
        """Which of the asks got something else than alone, to the bit. but: ids of some that are not looked at."""
        alone = zip(self.asks, self.alone.answers, strict=True)
        own = {id(ask): answer for ask, answer in alone if id(ask) not in but}
        told = []
        for ask, answer in zip(done.asks, done.answers, strict=True):
            expected = own.get(id(ask))
            if expected is not None and not equal(expected, answer):
                told.append(f"{ask.adapter or 'base'}, prompt of {len(ask.prompt)}, {ask.params.temperature}")
        return told


def config(folder: Path, adapters: dict[str, Path], **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "model_path": str(folder),
        "device": "cpu",
        "context_length": 256,
        "max_total_tokens": 16384,
        "max_running_requests": 100,
        "disable_radix_cache": True,
        "lora_paths": tuple(LoraPath(name=name, path=str(path)) for name, path in adapters.items()),
        "max_host_lora_bytes": 256 << 20,
    }
    return EngineConfig(**(defaults | settings))


def make_model(
    folder: Path, adapters: dict[str, Path], count: int, tokens: int, others: int, dtype: str = "auto"
) -> Model:
    """count, tokens: requests that are compared, and of their answers; others: tokens of half as many beside them."""
    owners = [None, *adapters]
    asks = tuple(
        Ask(prompt, owners[i % len(owners)], _params(i, tokens))
        for i, prompt in enumerate(text_prompts(folder, count, 1, 90))
    )
    beside = tuple(
        Ask(prompt, owners[i % len(owners)], msgspec.structs.replace(OTHER, max_tokens=others))
        for i, prompt in enumerate(text_prompts(folder, count // 2, 20, 150, seed=1))
    )
    alone = asyncio.run(run(config(folder, adapters, dtype=dtype), asks, alone=True))
    return Model(folder, adapters, asks, beside, alone, dtype)


def _params(index: int, tokens: int) -> SamplingParams:
    """Greedy and seeded in turn; every seventh wants the prompt's log-probabilities too."""
    chosen = SEEDED if index % 2 else GREEDY
    return msgspec.structs.replace(chosen, max_tokens=tokens, seed=index, prompt_logprobs=0 if index % 7 == 0 else None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("cut")
    model = cut_demo(folder / "model", 2)
    return make_model(model, random_adapters(folder, model), 32, 6, 75)


@pytest.fixture(scope="module")
def small_float32(small: Model) -> Model:
    return make_model(small.folder, small.adapters, 32, 6, 75, "float32")


@pytest.fixture(scope="module")
def whole() -> Model:
    return make_model(demo_folder(), demo_adapters(), 64, 32, 100)


pytestmark = pytest.mark.demo


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("small_float32", "whole")]


@pytest.fixture(params=["small", *SLOW])
def model(request: pytest.FixtureRequest) -> Model:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Model)
    return found


async def test_all_at_once(model: Model) -> None:
    """In float32 no step is full, so that no prompt is cut: which one would be depends on who has come by then."""
    uncut = {} if model.narrow else {"chunked_prefill_size": 4096}
    done = await run(model.config(**uncut), model.asks)
    assert model.differing(done) == []
    assert done["mixed_adapter_steps"] > 0
    assert not (uncut and done["prompt_chunks"])


async def test_shuffled_beside_others_with_prefix_cache(model: Model) -> None:
    """Others of other lengths run beside them; in the second round most prompts are found in the cache."""
    mixed = shuffled([*model.asks, *model.others])
    done = await run(model.config(disable_radix_cache=False), mixed, shuffled(mixed, seed=1))
    assert len(model.differing(done)) <= model.most_cut
    assert done["prefix_hit_tokens"] > 16 * len(model.asks)


async def test_short_steps_without_stack_or_overlap(model: Model) -> None:
    """Prompts are cut into small parts, adapters computed one by one, nothing is planned ahead."""
    settings = {"chunked_prefill_size": 48, "lora_stack": False, "disable_overlap_schedule": True}
    done = await run(model.config(**settings), shuffled([*model.others, *model.asks], seed=2))
    assert len(model.differing(done)) <= model.most_cut
    assert done["prompt_chunks"] > 20


async def test_preempted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that gave way compute their own output again, as part of a prompt."""
    gave_way, preempt = set[tuple[int, ...]](), Roster.preempt

    def noted(roster: Roster, sequence: Started) -> None:
        gave_way.add(tuple(sequence.request.submit.prompt))
        preempt(roster, sequence)

    monkeypatch.setattr(Roster, "preempt", noted)
    done = await run(model.config(max_total_tokens=model.few_tokens), shuffled([*model.others, *model.asks], seed=3))
    again = {id(ask): i for i, ask in enumerate(done.asks) if tuple(ask.prompt) in gave_way}
    assert again
    alone = await run(model.config(), [done.asks[i] for i in again.values()], alone=True)
    pairs = [(a, done.answers[i], done.asks[i]) for a, i in zip(alone.answers, again.values(), strict=True)]
    assert all(equal(a, b) if model.narrow else close(a, b) for a, b, _ in pairs)
    for a, b, ask in pairs:
        if (at := same_tokens(a, b)) < len(a.tokens):
            assert ask in model.others
            assert max(a.logprobs[at].logprob, b.logprobs[at].logprob) < math.log(TOLERANCE)
    assert len(model.differing(done, but=again)) <= model.most_cut

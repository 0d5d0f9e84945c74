"""The demo model with each of its adapters and without, against transformers and PEFT in float32.

The short form runs always; the whole one, of 64 tokens on 20 prompts each, is marked slow.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig, LoraPath
from engine.types import SamplingParams
from tests.parity.demo import chat_prompts, demo_adapters, demo_folder
from tests.parity.judge import Ask
from tests.parity.reference import Reference
from tests.parity.runs import run, shuffled

pytestmark = pytest.mark.demo
GREEDY = SamplingParams(max_tokens=64, seed=0, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(demo_folder(), demo_adapters())


def config(**settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "context_length": 512,
        "max_total_tokens": 24576,
        "max_running_requests": 160,
        "lora_paths": tuple(LoraPath(name=name, path=str(path)) for name, path in demo_adapters().items()),
        "max_host_lora_bytes": 256 << 20,
    }
    return EngineConfig(**(defaults | settings))


def asks(folder: Path, count: int, tokens: int) -> list[Ask]:
    params = msgspec.structs.replace(GREEDY, max_tokens=tokens)
    owners = [None, *demo_adapters()]
    return [Ask(prompt, owner, params) for prompt in chat_prompts(folder)[:count] for owner in owners]


async def test_short(reference: Reference) -> None:
    done = await run(config(), shuffled(asks(demo_folder(), 1, 12)))
    done.judged(reference).verdict()
    assert done["mixed_adapter_steps"] > 5


@pytest.mark.slow
async def test_whole_mixed(reference: Reference) -> None:
    """All at once, in chunks; every prompt bypasses the prefix cache for its log-probabilities."""
    done = await run(config(), shuffled(asks(demo_folder(), 20, 64)))
    judge = done.judged(reference)
    judge.verdict()
    assert judge.positions == 20 * 64 * (1 + len(demo_adapters()))
    assert done["prompt_chunks"] > 0
    assert done["mixed_adapter_steps"] > 60


@pytest.mark.slow
async def test_whole_alone(reference: Reference) -> None:
    """One after the other; owners keep the order of the questions, so that the prefix cache serves each its own."""
    params = msgspec.structs.replace(GREEDY, prompt_logprobs=None, max_tokens=24)
    work = [Ask(ask.prompt, ask.adapter, params) for ask in asks(demo_folder(), 5, 24)]
    done = await run(config(), work, work, alone=True)
    done.judged(reference).verdict()
    assert done["prefix_hit_tokens"] > 0

"""On the CPU in bfloat16 a request's numbers do not depend, to the bit, on what shares its batch or how it was cut."""

from pathlib import Path

import msgspec
import pytest
import torch

from engine.adapters.bank import AdapterBank
from engine.layers.linear import cpu_has_bfloat16
from tests.engine.worker.harness import GREEDY, Driver, Pages, Request, make_pages, random_weights, start, tiny_llama
from tests.engine.worker.test_parity_base import prompts

pytestmark = pytest.mark.skipif(not cpu_has_bfloat16(), reason="the CPU does not multiply bfloat16 natively")

MODULES = range(7)
RANKS = ({0: 8, 2: 8}, dict.fromkeys(MODULES, 16), dict.fromkeys(MODULES, 40), {1: 64, 4: 24})
OWNERS = (None, 1, 2, 3, 4, None, 3, 2)
SEEDED = msgspec.structs.replace(GREEDY, temperature=1.0, seed=11, top_p=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bits")
    tiny_llama(path, hidden_size=96, head_dim=32, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160)
    return path


def driver(folder: Path, seed: int = 0, **settings: object) -> Driver:
    made = Driver(start(folder, dtype="bfloat16", **settings), slots=len(RANKS), seed=seed)
    for adapter_id, ranks in enumerate(RANKS, 1):
        made.load(adapter_id, adapter_pages(made, ranks, adapter_id))
    return made


def adapter_pages(made: Driver, ranks: dict[int, int], seed: int) -> Pages:
    info = made.worker.info
    return make_pages(random_weights(info.dims, ranks, seed), info.geometry, torch.bfloat16)


def requests() -> list[Request]:
    texts = prompts(len(OWNERS), 120, seed=8)
    return [Request(p, o, SEEDED if i % 2 else GREEDY) for i, (p, o) in enumerate(zip(texts, OWNERS, strict=True))]


def answers(run: list[Request]) -> list[tuple[list[int], list[float]]]:
    return [(request.tokens, [told.logprob for told in request.logprobs]) for request in run]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[list[int], list[float]]]:
    made = driver(folder, lora_stack=False)
    return [answers(made.run([request]))[0] for request in requests()]


@pytest.mark.parametrize("lora_stack", [True, False])
@pytest.mark.parametrize("chunk", [(1000, 1000), (1, 20), (30, 70)])
def test_mixed_equals_alone(
    folder: Path, alone: list[tuple[list[int], list[float]]], chunk: tuple[int, int], lora_stack: bool
) -> None:
    made = driver(folder, seed=sum(chunk), lora_stack=lora_stack)
    for _ in range(2):
        assert answers(made.run(requests(), chunk)) == alone
        made.settle()
    assert (made.worker.lora_steps["stacked"] > 0) == lora_stack


def test_stack_of_other_adapters_changes_nothing(folder: Path, alone: list[tuple[list[int], list[float]]]) -> None:
    """A stack built for more adapters than the batch has gives the same bits as the adapter alone."""
    made = driver(folder)
    made.run([r for r in requests() if r.adapter_id in (2, 3, 4)])
    made.settle()
    bank = made.worker._bank
    assert isinstance(bank, AdapterBank)
    stack = bank.stack()
    assert stack is not None
    assert len(stack.adapter_ids) == 3
    before = made.worker.lora_steps["stacked"]
    assert answers(made.run(requests()[3:4])) == alone[3:4]
    assert made.worker.lora_steps["stacked"] > before


def test_cached_prefix(folder: Path) -> None:
    made = driver(folder)
    prompt = prompts(1, 1, seed=3)[0] * 50 + [5, 6]
    (first,) = made.run([Request(prompt, 2)], poison=False)
    (second,) = made.run([Request(prompt, 2, cached=first), *requests()])[:1]
    assert answers([second]) == answers([first])

"""The parity checks can fail: each fault that is put into the engine here is reported by the judge."""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from engine.adapters import host
from engine.adapters.host import HostAdapter, HostTier
from engine.adapters.peft_config import LoraSettings
from engine.blocks import chain_seed
from engine.layers.attention import TorchAttention
from engine.plan import StepPlan
from engine.worker.worker import Worker
from tests.parity.judge import Ask, Judge
from tests.parity.runs import run
from tests.parity.zoo import ADAPTERS, Zoo, asks, prompts

Patch = pytest.MonkeyPatch
FIRST, EVERYONE = next(iter(ADAPTERS)), (None, *ADAPTERS)


def work() -> list[Ask]:
    """Everyone with prompts of their own, and with one long prompt that all have in common."""
    own = asks(8, EVERYONE, least=4, most=30, max_tokens=6)
    shared = prompts(1, 50, 50, seed=8)[0]
    return [*own, *(Ask(shared, ask.adapter, ask.params) for ask in reversed(own))]


async def judged(zoo: Zoo) -> Judge:
    """One request after the other, so that each finds the state that those before it left."""
    return (await run(zoo.config(), work(), alone=True)).judged(zoo.reference)


def zeroed_adapter(patch: Patch) -> None:
    store = HostTier.store

    def zeroing(self: HostTier, adapter_id: int, file: Any) -> HostAdapter:
        adapter = store(self, adapter_id, file)
        if adapter_id == 1:
            for page in adapter.pages:
                page.zero_()
        return adapter

    patch.setattr(HostTier, "store", zeroing)


def swapped_slots(patch: Patch) -> None:
    forward = Worker.forward

    def swapping(self: Worker, plan: StepPlan) -> None:
        if len(plan.slots) > 1 and None not in plan.slots[:2]:
            plan = dataclasses.replace(plan, slots=(*plan.slots[1::-1], *plan.slots[2:]))
        forward(self, plan)

    patch.setattr(Worker, "forward", swapping)


def seedless_chains(patch: Patch) -> None:
    """The prefix of whoever came first is served to everyone."""
    patch.setattr("engine.roster.chain_seed", lambda adapter_id, salt: chain_seed(None, salt))


def base_with_adapter(patch: Patch) -> None:
    """The base's tokens get the delta of the adapter in the first slot."""
    forward = Worker.forward

    def adapting(self: Worker, plan: StepPlan) -> None:
        if plan.slots and plan.slots[0] is not None:
            steps = tuple(msgspec.structs.replace(step, slot=max(step.slot, 0)) for step in plan.sequences)
            plan = dataclasses.replace(plan, sequences=steps)
        forward(self, plan)

    patch.setattr(Worker, "forward", adapting)


def no_rslora(patch: Patch) -> None:
    def scale(self: LoraSettings, name: str, rank: int) -> float:
        return self.alphas.value(name, self.alpha) / rank

    patch.setattr(LoraSettings, "scale_of", scale)


def no_alpha_pattern(patch: Patch) -> None:
    def scale(self: LoraSettings, name: str, rank: int) -> float:
        return self.alpha / (rank**0.5 if self.rslora else rank)

    patch.setattr(LoraSettings, "scale_of", scale)


def rank_of_the_config(patch: Patch) -> None:
    """The scale made with `r` where rank_pattern says otherwise."""
    scale_of = LoraSettings.scale_of
    patch.setattr(LoraSettings, "scale_of", lambda self, name, rank: scale_of(self, name, self.rank))


def last_rank_lost(patch: Patch) -> None:
    fill = host._fill_piece

    def losing(page: Any, place: Any, pair: Any, scale: float, dims: Any) -> None:
        fill(page, place, dataclasses.replace(pair, a=pair.a[:-1], b=pair.b[:, :-1]), scale, dims)

    patch.setattr(host, "_fill_piece", losing)


def own_token_masked(patch: Patch) -> None:
    """Attention that does not see the newest position."""
    mask = TorchAttention._mask

    def short(self: TorchAttention, positions: Any, capacity: int, window: int) -> torch.Tensor:
        return mask(self, (positions - 1).clip(0), capacity, window)

    patch.setattr(TorchAttention, "_mask", short)


MUTATIONS: dict[Callable[[Patch], None], set[str]] = {  # whose answers must be found wrong, among others
    zeroed_adapter: {FIRST},
    swapped_slots: {FIRST, "five"},
    base_with_adapter: {"base"},
    no_rslora: {"five", "huge"},
    no_alpha_pattern: {"patterns"},
    rank_of_the_config: {"patterns"},
    last_rank_lost: set(ADAPTERS),
    own_token_masked: {"base", *ADAPTERS},
    seedless_chains: {"base"},
}


async def test_without_a_fault(zoo: Zoo) -> None:
    (await judged(zoo)).verdict()


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
async def test_seen(zoo: Zoo, monkeypatch: Patch, mutate: Callable[[Patch], None]) -> None:
    mutate(monkeypatch)
    judge = await judged(zoo)
    blamed = {fault.split(",")[0] for fault in judge.faults}
    assert MUTATIONS[mutate] <= blamed
    with pytest.raises(AssertionError, match="faults in"):
        judge.verdict()

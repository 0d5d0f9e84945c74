"""Faults put into the brain on purpose: each must make the random histories fail, or these prove nothing."""

from collections.abc import Callable

import pytest

from engine.arena import Arena
from engine.blocks import Blocks
from engine.commit import Committer
from engine.roster import Roster
from engine.sequence import Sequence
from engine.slots import Slots
from tests.engine.test_scheduler_random import play

Fault = Callable[[pytest.MonkeyPatch], None]
SEEDS = range(40)  # the fault need not show in every history


def chunks_are_free_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Arena, "note", lambda self, chunk, step: None)
    patch.setattr(Arena, "check", lambda self: None)


def the_chain_has_no_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("engine.roster.chain_seed", lambda adapter_id, salt: b"")


def tokens_are_hashed_without_their_parents(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("engine.blocks.block_digest", lambda parent, tokens: bytes(str(tokens), "ascii"))
    patch.setattr(Blocks, "lookup", _lookup_by_digest)


def slots_are_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "table", property(lambda self: tuple(reversed(self._table))))


def held_slots_are_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "available", lambda self, adapter_id: True)
    patch.setattr(Slots, "_least_recently_held", lambda self: 0)
    patch.setattr(Slots, "check", lambda self, running: None)


def resumed_sequences_speak_again(patch: pytest.MonkeyPatch) -> None:
    preempt = Roster.preempt

    def forgetful(self: Roster, sequence: Sequence) -> None:
        preempt(self, sequence)
        del sequence.tokens[sequence.prompt_length :]
        sequence.outputs = sequence.pending

    patch.setattr(Roster, "preempt", forgetful)


def unready_adapters_are_planned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("engine.adapters.adapter.Adapter.ready", property(lambda self: bool(self.chunks)))


def reported_positions_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Committer, "_append", _append_and_forget)


def _lookup_by_digest(self: Blocks, chain: object, tokens: list[int], limit: int) -> list[int]:
    size, found = self.block_tokens, []
    for start in range(0, limit // size * size, size):
        cached = self._by_digest.get(bytes(str(tokens[start : start + size]), "ascii"))
        if cached is None:
            break
        found.append(cached.chunk)
    return found


append = Committer._append


def _append_and_forget(self: Committer, sequence: Sequence, sampled: list[int]) -> object:
    sequence.reported = 0
    return append(self, sequence, sampled)


@pytest.mark.parametrize(
    "fault",
    [
        chunks_are_free_at_once,
        the_chain_has_no_seed,
        tokens_are_hashed_without_their_parents,
        slots_are_swapped,
        held_slots_are_taken,
        resumed_sequences_speak_again,
        unready_adapters_are_planned,
        reported_positions_are_forgotten,
    ],
)
def test_a_fault_is_noticed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    assert any(_fails(seed) for seed in SEEDS), "no history failed"


def _fails(seed: int) -> bool:
    try:
        play(seed)
    except (AssertionError, KeyError, IndexError, LookupError, MemoryError, TypeError):
        return True
    return False


def test_without_a_fault_they_pass() -> None:
    assert not any(_fails(seed) for seed in SEEDS[:5])

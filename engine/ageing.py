"""How long sequences wait for a slot and loads for memory, and what is kept for the longest waiting. For the planner.

One slot at a time drains for one sequence, and one load at a time gets what is freed; docs/architecture.md has the
bounds. With `patience` None nothing is ever kept for anybody.
"""

from collections.abc import Iterable

from engine.adapters.adapter import Adapter
from engine.roster import Roster
from engine.sequence import Sequence, SequenceState


class SlotQueue:
    """Whose turn it is when every slot is held by other adapters."""

    def __init__(self, patience: int | None, prompt_tokens: int, roster: Roster) -> None:
        self._patience = patience
        self._prompt_tokens = prompt_tokens
        self._roster = roster
        self._first: Sequence | None = None  # of those that found no slot, the first in the queue's order
        self._owner: Sequence | None = None  # whom a slot is kept for
        self._draining: Adapter | None = None  # it gets no further sequences until the owner runs

    @property
    def owner(self) -> Adapter | None:
        """Whose sequence a slot is kept for."""
        return None if self._owner is None else self._owner.adapter

    def bars(self, adapter: Adapter) -> bool:
        return adapter is self._draining

    def passed(self, sequences: list[Sequence], step: int) -> None:
        """A scan of the queue passed over these for want of a slot."""
        for sequence in sequences:
            sequence.passed_since = sequence.passed_since or step
        self._first = next((s for s in sequences if self._due(s, step)), sequences[0] if sequences else None)

    def review(self, step: int) -> bool:
        """Ends a reservation whose owner runs or is gone, begins the next; whether one begins."""
        if self._owner is not None and not _waits(self._owner):
            self._owner = self._draining = None
        first = self._first
        if self._owner is not None or first is None or not _waits(first) or not self._due(first, step):
            return False
        self._draining = self._drains_soonest()
        if self._draining is not None:
            self._owner = first
        return self._owner is not None

    def _due(self, sequence: Sequence, step: int) -> bool:
        since = sequence.passed_since
        return self._patience is not None and since > 0 and step - since >= self._patience

    def _drains_soonest(self) -> Adapter | None:
        """The adapter whose running sequences end first, each at its longest."""
        left: dict[Adapter, int] = {}
        for sequence in self._roster.running.values():
            if sequence.adapter is not None:
                prompt = max(sequence.prompt_length - sequence.planned, 0)
                steps = sequence.params.max_tokens - sequence.outputs + -(-prompt // self._prompt_tokens)
                left[sequence.adapter] = max(left.get(sequence.adapter, 0), steps)
        return min(left, key=left.__getitem__, default=None)


class LoadQueue:
    """Loads that found no memory, longest waiting first."""

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._since: dict[Adapter, int] = {}  # step of the first try; in order
        self._kept: set[Adapter] = set()  # loaded for their turn, not used yet

    @property
    def kept(self) -> set[int]:
        """adapter_ids that others' memory is not made of until a sequence of theirs has run."""
        if self._kept:
            self._kept = {a for a in self._kept if a.chunks and a.tally.waiting and not a.tally.running}
        return {adapter.adapter_id for adapter in self._kept}

    def starved(self, adapters: Iterable[Adapter], step: int) -> None:
        """These, and no others, found no memory in this step."""
        self._since = {adapter: self._since.get(adapter, step) for adapter in adapters}
        if len(self._since) > 1:
            self._since = dict(sorted(self._since.items(), key=lambda entry: entry[1]))

    def due(self, step: int) -> Adapter | None:
        """The load that has waited for its patience: what is freed from now on is its, so nobody is admitted."""
        return self._waiting(step, 1)

    def overdue(self, step: int) -> Adapter | None:
        """It has waited as long again: running sequences make way."""
        return self._waiting(step, 2)

    def granted(self, adapter: Adapter) -> None:
        """It has its memory."""
        del self._since[adapter]
        self._kept.add(adapter)

    def _waiting(self, step: int, times: int) -> Adapter | None:
        if self._patience is None or not self._since:
            return None
        adapter, since = next(iter(self._since.items()))
        wanted = adapter.tally.waiting or (adapter.pinned and not adapter.draining)
        loadable = adapter.on_host and not adapter.chunks and adapter.error is None
        patience = max(self._patience, 1)  # else nobody were ever admitted between two loads
        return adapter if wanted and loadable and step - since >= times * patience else None


def _waits(sequence: Sequence) -> bool:
    adapter = sequence.adapter
    if adapter is None or sequence.state is not SequenceState.WAITING:
        return False
    return adapter.on_host and adapter.error is None

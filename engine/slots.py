"""Which adapter stands in which slot. A slot is a row of the kernels' table and owns no memory.

Running sequences hold their adapter's slot, so a plan's rows always find theirs; a slot that nobody holds keeps its
adapter until another needs it, least recently held first.
"""


class Slots:
    """`count` slots; an adapter stands in at most one."""

    def __init__(self, count: int) -> None:
        self._table: list[int | None] = [None] * count
        self._of: dict[int, int] = {}
        self._holders = [0] * count  # running sequences of the slot's adapter
        self._released = [0] * count  # a clock that counts releases
        self._clock = 0

    @property
    def table(self) -> tuple[int | None, ...]:
        """adapter_id in each slot, as plans carry it."""
        return tuple(self._table)

    @property
    def used(self) -> int:
        return len(self._of)

    def available(self, adapter_id: int) -> bool:
        """Whether `acquire` would succeed."""
        return adapter_id in self._of or 0 in self._holders

    def acquire(self, adapter_id: int) -> int:
        """The adapter's slot, held once more; raises LookupError when all are held by other adapters."""
        slot = self._of.get(adapter_id)
        if slot is None:
            slot = self._least_recently_held()
            self._put(slot, adapter_id)
        self._holders[slot] += 1
        return slot

    def release(self, adapter_id: int) -> None:
        """One running sequence less; the adapter keeps its slot until another needs it."""
        slot = self._of[adapter_id]
        self._holders[slot] -= 1
        self._clock += 1
        self._released[slot] = self._clock

    def clear(self, adapter_id: int) -> None:
        """The adapter left the arena: its slot is empty from the next plan on."""
        slot = self._of.pop(adapter_id, None)
        if slot is not None:
            assert not self._holders[slot], "an adapter in use left its slot"
            self._table[slot] = None

    def check(self, running: dict[int, int]) -> None:
        """Raises AssertionError unless exactly these adapters (adapter_id -> running sequences) hold slots."""
        assert self._of == {adapter: slot for slot, adapter in enumerate(self._table) if adapter is not None}
        assert {adapter: self._holders[slot] for adapter, slot in self._of.items() if self._holders[slot]} == running
        assert not any(holders for holders, adapter in zip(self._holders, self._table, strict=True) if adapter is None)

    def _least_recently_held(self) -> int:
        unheld = [slot for slot, holders in enumerate(self._holders) if not holders]
        if not unheld:
            raise LookupError("every slot is held")
        return min(unheld, key=lambda slot: (self._table[slot] is not None, self._released[slot]))

    def _put(self, slot: int, adapter_id: int) -> None:
        old = self._table[slot]
        if old is not None:
            del self._of[old]
        self._table[slot] = adapter_id
        self._of[adapter_id] = slot

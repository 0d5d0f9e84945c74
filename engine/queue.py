"""Waiting sequences in the order of one policy, with a scan that passes over whole adapters. Used by the scheduler."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from operator import attrgetter

from engine.adapters.adapter import Adapter
from engine.fairness import Shares
from engine.sequence import Request, Sequence

# A policy gives a request's rank: lower goes first. Choices of a request stand together.
QueueOrder = Callable[[Request], tuple[int, ...]]

_key = attrgetter("key")


def first_come_first_served(request: Request) -> tuple[int, ...]:
    return (request.arrival,)


def by_priority(request: Request) -> tuple[int, ...]:
    """Lower priority values first, as they came among equals."""
    return (request.submit.priority, request.arrival)


def queue_order(policy: str) -> QueueOrder:
    """The policy of --schedule-policy; raises ValueError for an unknown one. `fair` needs shares besides."""
    policies: dict[str, QueueOrder] = {
        "fcfs": first_come_first_served,
        "priority": by_priority,
        "fair": first_come_first_served,  # within an adapter's line
    }
    if policy not in policies:
        raise ValueError(f"--schedule-policy {policy} is not known; choose one of {', '.join(policies)}")
    return policies[policy]


class WaitingQueue:
    """One sorted list an adapter (the base has one too): heads are few even where sequences are many."""

    def __init__(self, order: QueueOrder, shares: Shares | None = None) -> None:
        """With `shares`, the line whose adapter was served least goes first, whenever its sequences came."""
        self._order = order
        self._shares = shares
        self._lines: dict[Adapter | None, list[Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence at its place; one that comes back takes the place it had."""
        sequence.key = (*self._order(sequence.request), sequence.choice, sequence.sequence_id)
        if self._shares is not None and sequence.adapter not in self._lines:
            self._shares.joins(sequence.adapter, self._lines)
        insort(self._lines.setdefault(sequence.adapter, []), sequence, key=_key)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        line = self._lines[sequence.adapter]
        del line[bisect_left(line, sequence.key, key=_key)]
        self._size -= 1
        if not line:
            del self._lines[sequence.adapter]
            if self._shares is not None:
                self._shares.leaves(sequence.adapter)

    def line_of(self, adapter: Adapter | None) -> list[Sequence]:
        """The adapter's waiting sequences in order; not to be changed."""
        return self._lines.get(adapter, [])

    def wanted(self, count: int, where: Callable[[Adapter], bool]) -> list[Adapter]:
        """The first `count` distinct adapters for which `where` holds, in the order of their first sequences."""
        lines = [(a, line[0]) for a, line in self._lines.items() if a is not None and where(a)]
        first = heapq.nsmallest(count, lines, key=lambda line: self.place(line[1]))
        return [adapter for adapter, _ in first]

    def wanted_before(self, adapter: Adapter) -> set[int]:
        """adapter_ids with a waiting sequence earlier than any of this adapter's; all that wait if it has none."""
        mine = self._lines.get(adapter)
        place = None if mine is None else self.place(mine[0])
        return {
            other.adapter_id
            for other, line in self._lines.items()
            if other is not None and other is not adapter and (place is None or self.place(line[0]) < place)
        }

    def place(self, first: Sequence) -> tuple[float, ...]:
        """Where the line that this sequence heads stands now; lower goes first."""
        return first.key if self._shares is None else (self._shares.served(first.adapter), *first.key)

    def scan(self) -> "Scan":
        return Scan(self, [(self.place(line[0]), line[0]) for line in self._lines.values()])


class Scan:
    """One pass over the queue in order. The caller takes or passes over what `head` shows."""

    def __init__(self, queue: WaitingQueue, heap: list[tuple[tuple[float, ...], Sequence]]) -> None:
        self._queue = queue
        self._heap = heap
        heapq.heapify(heap)

    @property
    def head(self) -> Sequence | None:
        return self._heap[0][1] if self._heap else None

    def take(self) -> None:
        """Takes the head out of the queue."""
        _, sequence = self._heap[0]
        self._queue.remove(sequence)
        line = self._queue.line_of(sequence.adapter)
        if line:
            heapq.heapreplace(self._heap, (self._queue.place(line[0]), line[0]))
        else:
            heapq.heappop(self._heap)

    def skip_adapter(self) -> int:
        """Passes over every sequence of the head's adapter; how many those are."""
        _, sequence = heapq.heappop(self._heap)
        return len(self._queue.line_of(sequence.adapter))

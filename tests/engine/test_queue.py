"""The queue's order and its scan, against sorting."""

import random

import pytest

from engine.adapters.adapter import Adapter
from engine.blocks import Chain
from engine.messages import Submit
from engine.queue import WaitingQueue, by_priority, first_come_first_served, queue_order
from engine.sequence import Request, Sequence
from engine.types import SamplingParams

PARAMS = SamplingParams(max_tokens=1, seed=0)
ADAPTERS = [None, *(Adapter(i, f"a{i}", "", None, False, 0.0) for i in (1, 2, 3))]


def waiting(arrival: int, adapter: Adapter | None = None, priority: int = 0, choice: int = 0) -> Sequence:
    submit = Submit(request_id=arrival, prompt=[1], params=PARAMS, priority=priority)
    request = Request(submit, adapter, arrival, 0.0, frozenset())
    return Sequence(request, arrival * 10 + choice, choice, [1], Chain(b"", 4), PARAMS, 1, adapter)


def drain(queue: WaitingQueue) -> list[int]:
    scan = queue.scan()
    order = []
    while (head := scan.head) is not None:
        order.append(head.sequence_id)
        scan.take()
    return order


def test_first_come_first_served() -> None:
    queue = WaitingQueue(first_come_first_served)
    for arrival in (3, 1, 2):
        queue.push(waiting(arrival, priority=-arrival))
    assert drain(queue) == [10, 20, 30]
    assert len(queue) == 0


def test_priority_goes_before_arrival() -> None:
    queue = WaitingQueue(by_priority)
    for arrival, priority in ((1, 5), (2, 0), (3, 5), (4, -1)):
        queue.push(waiting(arrival, priority=priority))
    assert drain(queue) == [40, 20, 10, 30]


def test_choices_of_a_request_stand_together() -> None:
    queue = WaitingQueue(first_come_first_served)
    for arrival, choice in ((2, 0), (1, 2), (1, 0), (1, 1)):
        queue.push(waiting(arrival, choice=choice))
    assert drain(queue) == [10, 11, 12, 20]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="fcfs, priority, fair"):
        queue_order("lifo")


def test_a_skipped_adapter_is_passed_over_whole_and_stays() -> None:
    queue = WaitingQueue(first_come_first_served)
    for arrival, adapter in enumerate([1, 2, 1, 0, 2]):
        queue.push(waiting(arrival, ADAPTERS[adapter]))
    scan = queue.scan()
    assert scan.skip_adapter() == 2
    seen = []
    while scan.head is not None:
        seen.append(scan.head.sequence_id)
        scan.take()
    assert seen == [10, 30, 40]
    assert drain(queue) == [0, 20]


def test_wanted_are_the_first_distinct_adapters_in_order() -> None:
    queue = WaitingQueue(first_come_first_served)
    for arrival, adapter in enumerate([0, 3, 3, 1, 2]):
        queue.push(waiting(arrival, ADAPTERS[adapter]))
    assert queue.wanted(2, lambda adapter: True) == [ADAPTERS[3], ADAPTERS[1]]
    assert queue.wanted(2, lambda adapter: adapter.adapter_id != 1) == [ADAPTERS[3], ADAPTERS[2]]
    assert queue.wanted_before(ADAPTERS[2]) == {3, 1}  # type: ignore[arg-type]
    stranger = Adapter(9, "s", "", None, False, 0.0)
    assert queue.wanted_before(stranger) == {1, 2, 3}


@pytest.mark.parametrize("seed", range(10))
def test_random_histories_against_sorting(seed: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue(by_priority)
    inside: list[Sequence] = []
    for arrival in range(200):
        if rng.random() < 0.6 or not inside:
            sequence = waiting(arrival, rng.choice(ADAPTERS), priority=rng.randrange(3))
            queue.push(sequence)
            inside.append(sequence)
        else:
            queue.remove(inside.pop(rng.randrange(len(inside))))
        assert len(queue) == len(inside)
        assert set(queue) == set(inside)
    inside.sort(key=lambda s: (s.request.submit.priority, s.request.arrival))
    assert drain(queue) == [s.sequence_id for s in inside]

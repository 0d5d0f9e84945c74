"""The life of sequences: held, waiting, running, ended, with what each holds in each state. Called by the scheduler.

Every transition passes through here, so rows, slots, blocks and tallies always agree with the states.
"""

import heapq
from collections.abc import Iterable

from engine.adapters.adapter import Adapter, Tally
from engine.adapters.residency import Residency
from engine.blocks import Blocks, Chain, chain_seed
from engine.fairness import Shares
from engine.memory import Memory
from engine.messages import Submit
from engine.queue import WaitingQueue, queue_order
from engine.sequence import Request, Sequence, SequenceState


class Roster:
    """Requests that have not ended, the queue, the running sequences and the state rows 0..rows-1."""

    def __init__(self, rows: int, policy: str, blocks: Blocks, memory: Memory, residency: Residency) -> None:
        """Raises ValueError for an unknown policy."""
        self.base = Tally()
        self.shares = Shares(self.base) if policy == "fair" else None
        self.queue = WaitingQueue(queue_order(policy), self.shares)
        self.requests: dict[int, Request] = {}
        self.running: dict[int, Sequence] = {}  # by sequence_id, in order of admission
        self.unstarted = 0  # requests of which nothing was planned yet
        self._rows = list(range(rows))
        self._blocks = blocks
        self._memory = memory
        self._residency = residency
        self._arrivals = 0
        self._sequences = 0

    @property
    def free_rows(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Sequences accepted and without a state row."""
        return sum(len(request.choices) for request in self.requests.values()) - len(self.running)

    def oldest_wait(self, now: float) -> float:
        """Seconds since the arrival of the oldest request of which nothing was planned yet; 0 without one."""
        arrivals = (request.submitted for request in self.requests.values() if not request.started)
        return max(now - min(arrivals, default=now), 0.0)

    def sequences(self, adapter: Adapter | None) -> list[Sequence]:
        """All that have not ended."""
        return [s for request in self.requests.values() if request.adapter is adapter for s in request.choices]

    def tally(self, adapter: Adapter | None) -> Tally:
        return self.base if adapter is None else adapter.tally

    def accept(self, submit: Submit, adapter: Adapter | None, stops: frozenset[int], now: float) -> Request:
        """A new request: its first choice waits, the others are held until that one's prompt is committed."""
        request = Request(submit, adapter, self._arrivals, now, stops)
        self._arrivals += 1
        request.choices = [self._sequence(request, choice) for choice in range(submit.n)]
        self.requests[submit.request_id] = request
        self.unstarted += 1
        tally = self.tally(adapter)
        tally.requests += submit.n
        tally.waiting += submit.n
        tally.prompt_tokens += len(submit.prompt)
        self._lead(request)
        return request

    def admit(self, sequence: Sequence, blocks: list[int], cached: int) -> None:
        """Gives a sequence that the caller took from the queue a row and a slot; `cached` tokens need no computing."""
        assert not sequence.pending, "a preempted sequence came back before its last step had committed"
        sequence.row = heapq.heappop(self._rows)
        sequence.slot = -1 if sequence.adapter is None else self._residency.acquire(sequence.adapter)
        sequence.state = SequenceState.RUNNING
        sequence.admission += 1
        sequence.passed_since = 0
        sequence.blocks = blocks
        sequence.planned = cached
        sequence.told_blocks, sequence.hashed = 0, cached // self._blocks.block_tokens
        self.running[sequence.sequence_id] = sequence
        tally = self.tally(sequence.adapter)
        tally.waiting -= 1
        tally.running += 1
        if self.shares is not None and sequence.admission == 1:  # computing tokens again is not its doing
            self.shares.charge(sequence.adapter, prompt=sequence.prompt_length - cached)
        self._mark_started(sequence)

    def generated(self, adapter: Adapter | None, tokens: int) -> None:
        """A step sampled these."""
        self.tally(adapter).generated_tokens += tokens
        if self.shares is not None:
            self.shares.charge(adapter, generated=tokens)

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's row, slot and blocks; it will compute its tokens anew."""
        self._leave(sequence)
        sequence.planned = 0
        sequence.state = SequenceState.WAITING
        self.tally(sequence.adapter).waiting += 1
        self.queue.push(sequence)

    def preempt_latest(self) -> bool:
        """Preempts the sequence admitted last; False where none but the oldest runs, which never is."""
        if len(self.running) <= 1:
            return False
        self.preempt(self.running[next(reversed(self.running))])
        return True

    def prompt_done(self, request: Request, parent: Sequence | None, shared: int) -> None:
        """The held choices need not wait any more; they share the first `shared` blocks of `parent`."""
        request.prompt_done = True
        for sequence in request.choices:
            if sequence.state is SequenceState.HELD:
                if parent is not None:
                    self._memory.fork(parent, sequence, shared)
                    self._mark_started(sequence)
                self._wait(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence is over, whatever its state; what it holds is freed behind its last step."""
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        else:
            self._stop_waiting(sequence)
        sequence.state = SequenceState.ENDED
        request = sequence.request
        request.choices.remove(sequence)
        if sequence.started and sequence.adapter is not None:
            sequence.adapter.started -= 1
        if not request.choices:
            del self.requests[request.submit.request_id]
            self.unstarted -= not request.started
        elif not request.prompt_done and all(s.state is SequenceState.HELD for s in request.choices):
            self._lead(request)

    def end_requests(self, requests: Iterable[Request]) -> list[int]:
        """Ends all choices of these; the request_ids."""
        ended = list(requests)
        for request in ended:
            for sequence in reversed(list(request.choices)):
                self.end(sequence)
        return [request.submit.request_id for request in ended]

    def check(self) -> None:
        """Raises AssertionError unless states, rows, queue and tallies agree."""
        sequences = [s for request in self.requests.values() for s in request.choices]
        running = [s for s in sequences if s.state is SequenceState.RUNNING]
        waiting = [s for s in sequences if s.state is SequenceState.WAITING]
        assert {s.sequence_id: s for s in running} == self.running
        assert set(self.queue) == set(waiting)
        assert len(self.queue) == len(waiting)
        assert sorted([s.row for s in running] + self._rows) == list(range(len(running) + len(self._rows)))
        assert self.unstarted == sum(not request.started for request in self.requests.values())
        assert {s.sequence_id: s for s in waiting if s.blocks} == self._memory.forks
        for request in self.requests.values():
            assert request.choices, "a request without open choices was kept"
            held = [s for s in request.choices if s.state is SequenceState.HELD]
            assert not held or (not request.prompt_done and len(held) == len(request.choices) - 1)
        self._check_tallies(sequences)

    def _check_tallies(self, sequences: list[Sequence]) -> None:
        for adapter in {s.adapter for s in sequences} | {None}:
            mine = [s for s in sequences if s.adapter is adapter]
            running = sum(s.state is SequenceState.RUNNING for s in mine)
            tally = self.tally(adapter)
            assert (tally.running, tally.waiting) == (running, len(mine) - running), "tallies and states differ"
            assert adapter is None or adapter.started == sum(s.started for s in mine)

    def _sequence(self, request: Request, choice: int) -> Sequence:
        submit, adapter = request.submit, request.adapter
        self._sequences += 1
        chain = Chain(chain_seed(adapter.adapter_id if adapter else None, submit.salt), self._blocks.block_tokens)
        prompt = list(submit.prompt)
        return Sequence(request, self._sequences, choice, prompt, chain, submit.params, len(prompt), adapter)

    def _lead(self, request: Request) -> None:
        leader = request.choices[0]
        leader.reports = leader.params.prompt_logprobs is not None
        self._wait(leader)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self.queue.push(sequence)

    def _mark_started(self, sequence: Sequence) -> None:
        if not sequence.started and sequence.adapter is not None:
            sequence.adapter.started += 1
        sequence.started = True
        if not sequence.request.started:
            sequence.request.started = True
            self.unstarted -= 1

    def _leave(self, sequence: Sequence) -> None:
        del self.running[sequence.sequence_id]
        heapq.heappush(self._rows, sequence.row)
        self._blocks.drop(sequence.blocks, sequence.last_step)
        sequence.blocks, sequence.row, sequence.slot = [], -1, -1
        tally = self.tally(sequence.adapter)
        tally.running -= 1
        if sequence.adapter is not None:
            self._residency.release(sequence.adapter, sequence.last_step, tally.running)

    def _stop_waiting(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self.queue.remove(sequence)
        if sequence.blocks:
            self._memory.drop_fork(sequence)
        self.tally(sequence.adapter).waiting -= 1

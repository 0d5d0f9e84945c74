"""An independent observer of a running engine: every plan, commit, freed chunk and output is held against the design.

It keeps books of its own, made of what the worker and the client are told: promises 1 to 4, at every step.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.adapters.adapter import Adapter
from engine.draft import MAX_AHEAD
from engine.messages import Event, RequestFailed, SequenceOutput, StepOutputs, Submit
from engine.plan import AdapterLoad, SequenceStep, StepPlan, StepResult
from engine.sequence import Sequence
from engine.types import EngineError, FinishReason
from tests.support.engine import LocalEngine

Choice = tuple[int, int]  # request_id, choice


@dataclass(slots=True)
class Table:
    """A state row as the worker has it."""

    sequence_id: int
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class InFlight:
    """A plan that has not committed: the chunks that it reads or writes, each with who uses it."""

    step: int
    users: dict[int, str] = field(default_factory=dict)


class Watch:
    """Hooks itself into the engine; what it finds wrong is raised there, and ends the engine and the test."""

    def __init__(self, local: LocalEngine, check_every: int = 1) -> None:
        self.steps = 0
        self.fault: Exception | None = None  # the first that ended the engine
        self.ended: dict[Choice, str] = {}  # how each choice ended
        self.submitted: set[Choice] = set()
        self.served_by: dict[int, int | None] = {}  # request_id -> adapter_id, None: the base
        self.slot_waits: list[tuple[int, int]] = []  # (steps waited for a slot, others before it then)
        self.abort_steps: list[int] = []  # steps planned between a client's leaving and its end in the engine
        self._scheduler = local.engine.scheduler
        self._check_every = check_every
        self._flights: deque[InFlight] = deque()
        self._tables: dict[int, Table] = {}
        self._copying: dict[int, tuple[int, ...]] = {}  # adapter_id -> chunks
        self._resident: dict[int, tuple[int, ...]] = {}
        self._dead: set[int] = set()  # sequence_ids that were aborted
        self._left: dict[int, int] = {}  # request_id -> step planned last when its client left
        self._hook(self._scheduler, "plan", self._planned)
        self._hook(self._scheduler, "commit", self._committed, before=self._committing)
        self._hook(self._scheduler, "submit", self._accepted)
        self._hook(self._scheduler, "abort", self._aborted, before=self._aborting)
        self._hook(self._scheduler.adapters, "load_done", self._copied)
        self._hook(self._scheduler._residency, "evict", _nothing, before=self._evicted)
        self._hook(self._scheduler._roster, "admit", _nothing, before=self._admitting)
        self._hook(self._scheduler._arena, "on_free", _nothing, before=self._freed)
        self._hook(local.client, "_dispatch", _nothing, before=self._event)

    def client_leaves(self, request_id: int) -> None:
        """Told by a test that abandons a request."""
        self._left[request_id] = self._scheduler._arena.planned

    def check_ends(self) -> Counter[str]:
        """Every choice has ended, once; how many in which way."""
        missing = self.submitted - set(self.ended)
        assert not missing, f"choices that never ended: {sorted(missing)[:5]}"
        return Counter(self.ended.values())

    def _hook(
        self, owner: Any, name: str, after: Callable[..., None], before: Callable[..., None] | None = None
    ) -> None:
        inner = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            try:
                if before is not None:
                    before(*args, **kwargs)
                result = inner(*args, **kwargs)
                after(result, *args)
            except EngineError:  # a refusal
                raise
            except Exception as error:  # clients only see that the engine stopped
                self.fault = self.fault or error
                raise
            return result

        setattr(owner, name, hooked)

    # Plans

    def _planned(self, plan: StepPlan | None, now: float) -> None:
        if plan is None:
            return
        flight = InFlight(plan.step)
        for load in plan.loads:
            self._load(load)
        for admission in plan.admissions:
            self._tables[admission.row] = Table(admission.sequence_id)
        for step in plan.sequences:
            self._row(plan, step, flight)
        self._flights.append(flight)

    def _load(self, load: AdapterLoad) -> None:
        """Promise 2: nobody on the device, and nobody who runs, refers to the chunks that it overwrites."""
        chunks = set(load.chunks)
        assert len(chunks) == len(load.chunks)
        for earlier in self._flights:
            assert not chunks & set(earlier.users), f"a load into chunks that step {earlier.step} uses"
        running = {row.row: row.blocks for row in self._scheduler._roster.running.values()}
        assert not any(chunks & set(blocks) for blocks in running.values()), "a load into a running sequence's blocks"
        assert not any(chunks & set(other) for other in self._copying.values()), "two loads into the same chunk"
        self._copying[load.adapter_id] = load.chunks

    def _row(self, plan: StepPlan, step: SequenceStep, flight: InFlight) -> None:
        table = self._tables[step.row]
        assert table.sequence_id == step.sequence_id, "a row of another sequence"
        assert step.sequence_id not in self._dead, "a sequence was planned after its abort"
        assert len(table.blocks) == step.first_new_block
        table.blocks += step.new_blocks
        self._check_adapter(plan, step, flight)
        size = self._scheduler.config.block_tokens
        user = f"sequence {step.sequence_id}"
        first, last = step.start // size, (step.start + step.length - 1) // size
        for chunk in table.blocks[first : last + 1]:
            for other in (*self._flights, flight):
                assert other.users.get(chunk, user) == user, f"{user} writes where {other.users[chunk]} is"
        for chunk in table.blocks[: last + 1]:
            flight.users.setdefault(chunk, user)

    def _check_adapter(self, plan: StepPlan, step: SequenceStep, flight: InFlight) -> None:
        """Promise 3: the sequence's own adapter stands in its slot, copied before the step was planned."""
        adapter = self._scheduler._roster.running[step.sequence_id].adapter
        if adapter is None:
            assert step.slot == -1
            return
        adapter_id = plan.slots[step.slot]
        assert adapter_id == adapter.adapter_id, "a sequence in the slot of another adapter"
        assert adapter_id in self._resident, "a sequence was planned whose adapter is not there"
        flight.users.update(dict.fromkeys(self._resident[adapter_id], f"adapter {adapter_id}"))

    def _committing(self, result: StepResult, now: float) -> None:
        assert self._flights.popleft().step == result.step

    def _committed(self, outputs: list[SequenceOutput], result: StepResult, now: float) -> None:
        self.steps += 1
        if self.steps % self._check_every == 0:
            self._scheduler.check()

    def _copied(self, _: None, adapter_id: int, now: float) -> None:
        self._resident[adapter_id] = self._copying.pop(adapter_id)

    def _evicted(self, adapter: Adapter, reason: str) -> None:
        books = self._copying if adapter.copying else self._resident
        assert books.pop(adapter.adapter_id) == tuple(adapter.chunks)

    def _freed(self, chunk: int) -> None:
        """Promise 2."""
        for flight in self._flights:
            assert chunk not in flight.users, f"a chunk was freed that step {flight.step} uses"
        assert not any(chunk in chunks for chunks in self._copying.values()), "a chunk was freed that is being filled"

    # Requests

    def _accepted(self, _: None, command: Submit, now: float) -> None:
        choices = {(command.request_id, choice) for choice in range(command.n)}
        assert not choices & self.submitted
        self.submitted |= choices
        adapter = self._scheduler._roster.requests[command.request_id].adapter
        self.served_by[command.request_id] = None if adapter is None else adapter.adapter_id

    def _admitting(self, sequence: Sequence, blocks: list[int], cached: int) -> None:
        if sequence.passed_since:
            waited = self._scheduler._arena.planned + 1 - sequence.passed_since
            self.slot_waits.append((waited, len(self._scheduler._roster.queue._lines)))

    def _aborting(self, request_id: int, choice: int | None, now: float) -> None:
        request = self._scheduler._roster.requests.get(request_id)
        if request is not None:
            self._dead |= {s.sequence_id for s in request.choices if choice is None or s.choice == choice}
        if (left := self._left.pop(request_id, None)) is not None:
            self.abort_steps.append(self._scheduler._arena.planned - left)
            assert self.abort_steps[-1] <= MAX_AHEAD, "an abort came late"

    def _aborted(self, outputs: list[SequenceOutput], *_: object) -> None:
        for output in outputs:
            assert output.finish is FinishReason.ABORT

    def _event(self, event: Event) -> None:
        """Promise 4: one end for each choice, and nothing after it."""
        match event:
            case StepOutputs(outputs=outputs):
                for output in outputs:
                    self._output(output)
            case RequestFailed(request_id=request_id, code=code):
                self._end((c for c in self.submitted if c[0] == request_id and c not in self.ended), f"failed: {code}")

    def _output(self, output: SequenceOutput) -> None:
        choice = (output.request_id, output.choice)
        assert choice in self.submitted
        assert choice not in self.ended, f"an output after the end: {self.ended.get(choice)}"
        if output.finish is not None:
            self._end([choice], output.finish)

    def _end(self, choices: Iterable[Choice], how: str) -> None:
        for choice in list(choices):
            self.ended[choice] = how


def _nothing(*_: object) -> None:
    """No check after the call."""

"""A worker without a model for the scheduler's tests, and a driver that plays the loop's part around it.

KV entries are (position, token, adapter content); a row reads all entries of its sequence from its block table, so a
chunk that was reused too early, a wrong slot or a stale prefix block is an assertion or another token. Chunks that
the arena calls free are poisoned. Loads write as soon as they are planned, steps run as late as allowed.
"""

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.adapters.adapter import Hosted
from engine.adapters.residency import HostFullError
from engine.arena import ChunkUse
from engine.messages import RequestFailed, SequenceOutput, Submit
from engine.plan import AdapterLoad, Admission, SequenceResult, SequenceStep, StepPlan, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.types import EngineError, FinishReason, SamplingParams, TokenLogprob

VOCAB = 50
Entry = tuple[int, int, str | None]  # position, token, content of the adapter that wrote it
POISON: Entry = (-1, -1, "poison")


def digest(entries: list[Entry], *more: int) -> int:
    """The same in every process, which the hash of a string is not."""
    writer = zlib.crc32(repr(entries[-1][2]).encode())
    return hash((tuple(entry[:2] for entry in entries), writer, more))


def next_token(entries: list[Entry], seed: int, choice: int, index: int, banned: Iterable[int] = ()) -> int:
    """What the 'model' samples after these entries."""
    value = digest(entries, seed, choice, index)
    allowed = [token for token in range(VOCAB) if token not in banned]
    return allowed[value % len(allowed)]


def prompt_logprob(entries: list[Entry], token: int) -> TokenLogprob:
    return TokenLogprob(token, -(digest(entries, token) % 1000) / 100, 1, [])


@dataclass
class Alone:
    """What a choice gives when nothing else runs: the reference."""

    tokens: list[int]
    finish: FinishReason
    prompt_logprobs: list[TokenLogprob | None]


def run_alone(submit: Submit, choice: int, content: str | None, eos: frozenset[int]) -> Alone:
    params = submit.params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos)
    entries = [(position, token, content) for position, token in enumerate(submit.prompt)]
    logprobs = [None, *(prompt_logprob(entries[:i], submit.prompt[i]) for i in range(1, len(entries)))]
    tokens: list[int] = []
    while len(tokens) < params.max_tokens:
        banned = stops if len(tokens) < params.min_tokens else ()
        token = next_token(entries, params.seed, choice, len(tokens), banned)
        tokens.append(token)
        entries.append((len(entries), token, content))
        if token in stops:
            return Alone(tokens, FinishReason.STOP, logprobs)
    return Alone(tokens, FinishReason.LENGTH, logprobs)


@dataclass
class Row:
    """A worker's state row."""

    admission: Admission
    stops: frozenset[int]
    table: list[int] = field(default_factory=list)
    position: int = 0
    sampled: int | None = None


class SimulatedWorker:
    """Runs plans in order and checks each against the contract of engine/plan.py."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.chunks: list[list[Entry]] = [[POISON] * config.block_tokens for _ in range(config.num_chunks)]
        self.host: dict[int, str] = {}  # adapter_id -> content
        self.placed: dict[int, tuple[tuple[int, ...], str]] = {}
        self.rows: dict[int, Row] = {}

    def load(self, load: AdapterLoad) -> None:
        content = self.host[load.adapter_id]
        self.placed[load.adapter_id] = (load.chunks, content)
        for index, chunk in enumerate(load.chunks):
            self.chunks[chunk] = [(index, -2, content)] * self.config.block_tokens

    def run(self, plan: StepPlan) -> StepResult:
        for admission in plan.admissions:
            own = frozenset(admission.params.stop_token_ids)
            stops = own if admission.params.ignore_eos else own | self.config.eos_token_ids
            self.rows[admission.row] = Row(admission, stops)
        self._check_shape(plan)
        return StepResult(plan.step, [self._run_row(plan, row) for row in plan.sequences], 0.01)

    def _check_shape(self, plan: StepPlan) -> None:
        rows = [s.row for s in plan.sequences]
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < self.config.max_running for row in rows)
        assert plan.tokens <= self.config.step_tokens
        order = [(s.slot if s.slot >= 0 else 999, s.length > 1) for s in plan.sequences]
        assert order == sorted(order), "rows are not in the order of slots, decodes first"
        taken = [adapter for adapter in plan.slots if adapter is not None]
        assert len(set(taken)) == len(taken)
        assert {a.row for a in plan.admissions} <= set(rows)

    def _run_row(self, plan: StepPlan, step: SequenceStep) -> SequenceResult:
        row = self.rows[step.row]
        admission, size = row.admission, self.config.block_tokens
        assert admission.sequence_id == step.sequence_id
        assert step.first_new_block == len(row.table)
        row.table += step.new_blocks
        if step.start != row.position:  # a cached prefix is skipped once
            assert row.position == 0
            assert step.start % size == 0
        content = self._content(plan, step)
        tokens = step.tokens
        if not tokens:
            assert row.sampled is not None
            tokens = (row.sampled,)
        assert len(tokens) == step.length > 0
        entries = [self.chunks[row.table[p // size]][p % size] for p in range(step.start)]
        logprobs: list[TokenLogprob] = []
        for position, token in enumerate(tokens, step.start):
            entries.append((position, token, content))
            self._store(row.table[position // size], position % size, entries[-1])
            if step.prompt_logprobs and position + 1 < admission.prompt_length:
                logprobs.append(prompt_logprob(entries, admission.tokens[position + 1]))
        for position, entry in enumerate(entries):
            assert entry[0] == position, f"step {plan.step}: foreign KV at {position}: {entry}"
            assert entry[2] == content, f"step {plan.step}: KV of another adapter: {entry}"
        row.position = step.start + step.length
        told = SequenceResult(prompt_logprobs=logprobs if step.prompt_logprobs else None)
        if step.sample:
            self._sample(row, step, entries, told)
        return told

    def _sample(self, row: Row, step: SequenceStep, entries: list[Entry], told: SequenceResult) -> None:
        params = row.admission.params
        banned = row.stops if step.ban_stops else ()
        row.sampled = next_token(entries, params.seed, row.admission.choice, step.output_index, banned)
        told.tokens.append(row.sampled)

    def _content(self, plan: StepPlan, step: SequenceStep) -> str | None:
        if step.slot < 0:
            return None
        adapter_id = plan.slots[step.slot]
        assert adapter_id is not None
        chunks, content = self.placed[adapter_id]
        for index, chunk in enumerate(chunks):
            assert self.chunks[chunk][0] == (index, -2, content), "an adapter's chunk was overwritten"
        return content

    def _store(self, chunk: int, offset: int, entry: Entry) -> None:
        self.chunks[chunk] = [*self.chunks[chunk][:offset], entry, *self.chunks[chunk][offset + 1 :]]


@dataclass
class Followed:
    """A submitted request and what came of it."""

    submit: Submit
    content: str | None
    tokens: dict[int, list[int]]
    finish: dict[int, FinishReason] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob | None]] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    failed: RequestFailed | None = None


class Driver:
    """Plays loop, loader and device. `overlap` plans one step ahead; `check()` follows every operation."""

    def __init__(self, config: SchedulerConfig, *, overlap: bool = True, late_loads: bool = False) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.worker = SimulatedWorker(config)
        self.overlap = overlap
        self.late_loads = late_loads  # loads and fetches end only when told
        self.flights: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []
        self.copying: list[int] = []
        self.fetching: list[int] = []
        self.sources: dict[str, tuple[str, int]] = {}  # name -> (content, pages)
        self.requests: dict[int, Followed] = {}
        self.now = 0.0
        self._ids = 0

    # Adapters

    def add(self, name: str, pages: int = 2, *, cold: bool = False, pinned: bool = False) -> int:
        """Loads an adapter to the host, or only lists it."""
        self.sources[name] = (f"{name}/1", pages)
        control = self.scheduler.adapters
        if cold:
            return control.list_cold(name, name, pinned=pinned).adapter_id
        info, ours = control.begin_load(name, name, pinned=pinned, now=self.now)
        assert ours
        self._read(info.adapter_id)
        self.check()
        return info.adapter_id

    def replace(self, name: str, pages: int | None = None) -> int:
        """Loads other weights under a name that is loaded; what fails leaves the old ones."""
        self.change_source(name)
        content, before = self.sources[name]
        self.sources[name] = (content, pages or before)
        control = self.scheduler.adapters
        info = control.begin_replace(name, name, revision=None, pinned=None, weight=None, now=self.now)
        adapter_id = info.adapter_id
        try:
            self._read(adapter_id)
            control.take_over(adapter_id, None)
        except EngineError:
            control.give_up(adapter_id)
            self.worker.host.pop(adapter_id, None)
            raise
        finally:
            self.check()
        return adapter_id

    def change_source(self, name: str) -> None:
        content, pages = self.sources[name]
        base, version = content.split("/")
        self.sources[name] = (f"{base}/{int(version) + 1}", pages)

    def adapter_id(self, name: str) -> int:
        return self.scheduler.adapters.info(name).adapter_id

    def unload(self, name: str) -> None:
        """Begins, runs until drained, and finishes."""
        self.scheduler.adapters.begin_unload(name)
        for _ in range(10_000):
            if self.scheduler.adapters.drained(name):
                break
            assert self.step()
        self.scheduler.adapters.finish_unload(name)
        self.check()

    def _read(self, adapter_id: int) -> None:
        name = self.scheduler.adapters.catalog.get(adapter_id).name
        content, pages = self.sources[name]
        for gone in self.scheduler.adapters.make_host_room(adapter_id, pages):
            del self.worker.host[gone]
        adapter_id = self.scheduler.adapters.host_done(adapter_id, Hosted(pages, 8, ("q_proj",), content))
        self.worker.host[adapter_id] = content
        for followed in self.requests.values():  # a source that changed while they waited serves them anew
            if self._waits_for(followed, adapter_id):
                followed.content = content

    def _waits_for(self, followed: Followed, adapter_id: int) -> bool:
        request = self.scheduler._roster.requests.get(followed.submit.request_id)
        if request is None or request.started or request.adapter is None:
            return False
        return request.adapter.adapter_id == adapter_id

    def finish_copies(self, count: int | None = None) -> bool:
        """Ends copies to the device, all or the first so many."""
        done, self.copying = self.copying[:count], self.copying[len(self.copying[:count]) :]
        for adapter_id in done:
            self.scheduler.adapters.load_done(adapter_id, self.now)
        self.check()
        return bool(done)

    def finish_fetches(self, count: int | None = None) -> bool:
        """Ends fetches from sources; False when none brought anything."""
        due, self.fetching = self.fetching[:count], self.fetching[len(self.fetching[:count]) :]
        done = [self._fetched(adapter_id) for adapter_id in due]
        self.check()
        return any(done)

    def _fetched(self, adapter_id: int) -> bool:
        try:
            self._read(adapter_id)
        except HostFullError:
            self.scheduler.adapters.host_postponed(adapter_id)
            return False
        return True

    # Requests

    def submit(
        self, prompt: list[int], adapter: str | None = None, *, n: int = 1, max_tokens: int = 8,
        salt: str | None = None, priority: int = 0, **params: object,
    ) -> int:  # fmt: skip
        self._ids += 1
        submit = Submit(
            request_id=self._ids, prompt=prompt, n=n, salt=salt, priority=priority,
            adapter_id=None if adapter is None else self.adapter_id(adapter),
            params=SamplingParams(max_tokens=max_tokens, seed=7, **params),  # type: ignore[arg-type]
        )  # fmt: skip
        self.scheduler.submit(submit, self.now)
        content = None if adapter is None else self.sources[adapter][0]
        if adapter is not None:
            known = self.worker.host.get(self.adapter_id(adapter))
            content = known or content
        self.requests[self._ids] = Followed(submit, content, {choice: [] for choice in range(n)})
        self.check()
        return self._ids

    def abort(self, request_id: int, choice: int | None = None) -> None:
        self._take(self.scheduler.abort(request_id, choice, self.now))
        self.check()

    def fail(self, failures: list[RequestFailed]) -> None:
        for failure in failures:
            followed = self.requests[failure.request_id]
            assert followed.failed is None
            followed.failed = failure
        self.check()

    # Steps

    def plan(self) -> bool:
        """Plans one step if the scheduler has one."""
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.flights.append(plan)
            self.plans.append(plan)
            for gone in self.scheduler.adapters.take_evicted():
                del self.worker.placed[gone]
            for load in plan.loads:
                self.worker.load(load)
                self.copying.append(load.adapter_id)
        self.fetching += self.scheduler.take_fetches()
        self.check()
        return plan is not None

    def commit(self) -> bool:
        """Runs and commits the oldest plan."""
        if not self.flights:
            return False
        result = self.worker.run(self.flights.popleft())
        self._take(self.scheduler.commit(result, self.now))
        self.check()
        return True

    def step(self) -> bool:
        """One turn of the loop; False when nothing happened."""
        planned = len(self.flights) < (2 if self.overlap else 1) and self.plan()
        loaded = not self.late_loads and (self.finish_copies() | self.finish_fetches())
        full = len(self.flights) == (2 if self.overlap else 1)
        committed = (full or not planned) and self.commit()
        return planned or loaded or committed

    def run(self, limit: int = 100_000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.step():
                break
        assert self.scheduler.idle, "work is left, but nothing happens"

    def run_until(self, condition: Callable[[], bool], limit: int = 1000) -> None:
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError("it never happened")

    def _take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            followed = self.requests[output.request_id]
            assert followed.failed is None
            assert output.choice not in followed.finish, "an output after the end"
            if output.choice not in followed.cached_tokens:
                followed.cached_tokens[output.choice] = output.cached_tokens
            followed.tokens[output.choice] += output.tokens
            if output.prompt_logprobs:
                followed.prompt_logprobs.setdefault(output.choice, []).extend(output.prompt_logprobs)
            if output.finish is not None:
                followed.finish[output.choice] = output.finish
            if output.finish is FinishReason.STOP:
                assert output.stop_token == output.tokens[-1]

    # Checks

    def check(self) -> None:
        for old in self.scheduler.adapters.finish_retired():
            self.worker.host.pop(old.adapter_id, None)
        self.scheduler.check()
        arena = self.scheduler._arena
        for chunk in arena.owned(ChunkUse.FREE):
            self.worker.chunks[chunk] = [POISON] * self.config.block_tokens

    def check_outputs(self) -> None:
        """Everything that ended gave what it gives alone; what was aborted or failed gave the beginning of it."""
        for followed in self.requests.values():
            for choice, tokens in followed.tokens.items():
                alone = run_alone(followed.submit, choice, followed.content, self.config.eos_token_ids)
                finish = followed.finish.get(choice)
                if finish is None or finish is FinishReason.ABORT:
                    assert tokens == alone.tokens[: len(tokens)]
                    assert finish is not None or followed.failed is not None, "a choice never ended"
                else:
                    assert (tokens, finish) == (alone.tokens, alone.finish)
                    assert finish is FinishReason.LENGTH or tokens
            self._check_prompt_logprobs(followed, alone)

    def _check_prompt_logprobs(self, followed: Followed, alone: Alone) -> None:
        told = followed.prompt_logprobs
        for choice, values in told.items():
            whole = followed.finish.get(choice) in (FinishReason.STOP, FinishReason.LENGTH)
            assert values == (alone.prompt_logprobs if whole else alone.prompt_logprobs[: len(values)])
        if followed.submit.params.prompt_logprobs is None:
            assert not told
        elif followed.failed is None and FinishReason.ABORT not in followed.finish.values():
            assert len(told) == 1, "one choice reports the prompt"

    def check_empty(self) -> None:
        """Nothing is held but the cache and resident adapters."""
        counts = self.scheduler.stats().chunks
        assert counts["kv"] == 0
        assert sum(counts.values()) == self.config.num_chunks
        assert self.scheduler.stats().running == self.scheduler.stats().waiting == 0

    def counter(self, name: str) -> int:
        return self.scheduler.counters.counters[name]


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    """Half of them begin alike, so that the prefix cache is met."""
    length = rng.randint(1, longest)
    if rng.random() < 0.5:
        return [(i * 7) % VOCAB for i in range(length)]
    return [rng.randrange(VOCAB) for _ in range(length)]


def small_config(**changes: object) -> SchedulerConfig:
    """Blocks of 4 tokens, an arena of 24 chunks, contexts of 40 tokens, 2 slots."""
    values: dict[str, object] = {
        "num_chunks": 24,
        "block_tokens": 4,
        "chunk_bytes": 256,
        "max_model_len": 40,
        "eos_token_ids": frozenset({0}),
        "max_running": 6,
        "prefill_tokens": 12,
        "enable_lora": True,
        "max_slots": 2,
        "max_adapter_chunks": 4,
    }
    return SchedulerConfig(**{**values, **changes})  # type: ignore[arg-type]

"""The brain's face to the loop: requests in, plans out, results back. One thread; time is passed in.

A request: submit -> queue -> plan (row, slot, blocks) -> commit (tokens) -> ... -> ended. Plans run at most one step
ahead of the step that has not committed.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.adapters.adapter import Adapter
from engine.adapters.catalog import Catalog
from engine.adapters.control import AdapterControl
from engine.adapters.residency import Limits, Residency
from engine.arena import Arena
from engine.blocks import Blocks
from engine.commit import Committer
from engine.config import EngineConfig
from engine.draft import MAX_AHEAD, Flight, PlanLimits
from engine.eviction import Costs, EvictionClock, estimated_costs
from engine.memory import Memory
from engine.messages import SequenceOutput, Stats, Submit
from engine.plan import StepPlan, StepResult
from engine.planner import Planner
from engine.roster import Roster
from engine.slots import Slots
from engine.stats import Recorder, adapter_stats
from engine.types import EngineError, ErrorCode, FinishReason

MIN_FETCHES = 4  # sources read at once for waiting sequences: this many, or as many as there are slots


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The brain's sizes."""

    num_chunks: int
    block_tokens: int
    chunk_bytes: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_running: int = 256  # state rows
    max_queued: int | None = None  # requests of which nothing is planned yet
    prefill_tokens: int | None = 256  # a step's tokens, decodes first; None: every prompt in one step
    enable_lora: bool = False
    max_slots: int = 8  # --max-loras-per-batch
    max_loaded: int | None = None
    max_host_pages: int | None = None
    max_adapter_chunks: int = 0  # of the largest adapter allowed; Geometry.adapter_chunks
    policy: str = "fcfs"
    prefix_cache: bool = True
    patience: int | None = 64  # steps before a slot or memory is kept for who waits; None: never
    decode_steps: int = 0  # without new prompts behind a step that left nobody waiting
    prefetch: bool = True  # adapters are copied before a slot is free for them
    costs: Costs | None = None  # weights of eviction; None: least recently used
    first_adapter_id: int = 1
    unix_offset: float = 0.0  # what makes unix seconds of the `now` passed in

    @property
    def prompt_tokens(self) -> int:
        """What prompts get of a step, however many sequences decode."""
        return self.max_model_len if self.prefill_tokens is None else -(-self.prefill_tokens // 4)

    @property
    def step_tokens(self) -> int:
        """No plan has more tokens."""
        return max(self.prefill_tokens or 0, self.max_running + self.prompt_tokens)

    @property
    def context_blocks(self) -> int:
        return -(-self.max_model_len // self.block_tokens)

    @property
    def longest_context(self) -> int:
        """Tokens of context for which the arena suffices beside the largest adapter."""
        return (self.num_chunks - self.max_adapter_chunks) * self.block_tokens


def scheduler_config(
    config: EngineConfig, *, num_chunks: int, block_tokens: int, chunk_bytes: int, max_model_len: int,
    eos_token_ids: frozenset[int], max_adapter_chunks: int, on_gpu: bool, max_host_pages: int | None = None,
    unix_offset: float = 0.0, first_adapter_id: int = 1,
) -> SchedulerConfig:  # fmt: skip
    """The engine's flags and the sizes that start-up found."""
    chunk = (2048 if on_gpu else 256) if config.chunked_prefill_size is None else config.chunked_prefill_size
    spared = config.num_continuous_decode_steps
    return SchedulerConfig(
        num_chunks=num_chunks,
        block_tokens=block_tokens,
        chunk_bytes=chunk_bytes,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        max_running=config.max_running_requests,
        max_queued=config.max_queued_requests,
        prefill_tokens=chunk if chunk > 0 else None,
        enable_lora=config.enable_lora or bool(config.lora_paths),
        max_slots=config.max_loras_per_batch,
        max_loaded=config.max_loaded_loras,
        max_host_pages=max_host_pages,
        max_adapter_chunks=max_adapter_chunks,
        policy=config.schedule_policy,
        prefix_cache=not config.disable_radix_cache,
        first_adapter_id=first_adapter_id,
        unix_offset=unix_offset,
        patience=config.schedule_patience if config.schedule_patience >= 0 else None,
        decode_steps=int(on_gpu) if spared is None else spared,
        prefetch=config.lora_prefetch,
        costs=_costs(config.lora_eviction_policy, block_tokens, chunk_bytes, on_gpu),
    )


def _costs(policy: str, block_tokens: int, chunk_bytes: int, on_gpu: bool) -> Costs | None:
    """What --lora-eviction-policy weighs by; None: by the last use alone. Raises ValueError for an unknown policy."""
    match policy:
        case "cost":
            return estimated_costs(block_tokens, chunk_bytes, on_gpu=on_gpu)
        case "lru":
            return None
    raise ValueError(f"--lora-eviction-policy {policy} is not known; choose one of cost, lru")


class Scheduler:
    """Adapters are handled by `adapters`, counters by `counters`; everything else is here."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[Arena], EvictionClock] | None = None) -> None:
        """`clock` makes another order of eviction than that of `config.costs`.

        Raises ValueError when one full context and the largest adapter do not fit the arena.
        """
        if config.max_model_len > config.longest_context:
            raise ValueError(
                f"{config.num_chunks} chunks hold no context of {config.max_model_len} tokens beside the largest"
                f" adapter; the longest --context-length that fits is {config.longest_context}"
            )
        self.config = config
        self.counters = Recorder()
        self._flights: deque[Flight] = deque()
        self._arena = Arena(config.num_chunks)
        self._slots = Slots(config.max_slots)
        eviction = EvictionClock(self._arena, config.costs) if clock is None else clock(self._arena)
        self._residency = Residency(self._arena, self._slots, _limits(config), eviction)
        self._blocks = Blocks(self._arena, config.block_tokens, caching=config.prefix_cache, clock=eviction)
        self._memory = Memory(self._arena, self._blocks, self._residency, eviction)
        self._roster = Roster(config.max_running, config.policy, self._blocks, self._memory, self._residency)
        self.adapters = AdapterControl(
            Catalog(enabled=config.enable_lora, first_id=config.first_adapter_id), self._residency, self._roster,
            self.counters, max_fetches=max(config.max_slots, MIN_FETCHES), block_tokens=config.block_tokens,
            chunk_bytes=config.chunk_bytes, unix_offset=config.unix_offset,
        )  # fmt: skip
        limits = PlanLimits(
            chunk=config.prefill_tokens or 0,
            least=config.prompt_tokens,
            chunking=config.prefill_tokens is not None,
            max_wanted=config.max_slots,
            patience=config.patience,
            decode_steps=config.decode_steps,
            prefetch=config.prefetch,
        )
        self._planner = Planner(
            limits, self._arena, self._blocks, self._memory, self._residency, self._slots, self._roster, self.counters
        )
        self._committer = Committer(self._blocks, self._roster, self.counters)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._roster.requests)

    @property
    def idle(self) -> bool:
        """Nothing accepted, nothing on its way."""
        return not self.has_work and not self._flights

    def submit(self, command: Submit, now: float) -> None:
        """Queues a request. Raises EngineError: stale or failed adapter, too long, malformed, queue full."""
        self._refuse_invalid(command)
        adapter = None if command.adapter_id is None else self.adapters.catalog.for_request(command.adapter_id)
        limit = self.config.max_queued
        if limit is not None and self._roster.unstarted >= limit:
            raise EngineError(ErrorCode.QUEUE_FULL, f"the queue is full: {limit} requests wait already")
        if adapter is not None:
            self.adapters.wanted(adapter, now)
        self._roster.accept(command, adapter, self._stops(command), now)

    def abort(self, request_id: int, choice: int | None, now: float) -> list[SequenceOutput]:
        """Ends a request, or one choice, at once; rows on their way are discarded. Unknown ids are ignored."""
        request = self._roster.requests.get(request_id)
        ended = [] if request is None else [s for s in request.choices if choice is None or s.choice == choice]
        for sequence in reversed(ended):  # held choices first, so that none is put forward in vain
            self._roster.end(sequence)
        self.counters.add("aborted", len(ended))
        return [SequenceOutput(request_id, s.choice, [], FinishReason.ABORT) for s in ended]

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None when there is nothing to do now or one plan is ahead already. May hold loads alone."""
        if len(self._flights) >= MAX_AHEAD:
            return None
        flight = self._planner.plan(self.adapters.catalog.pinned, now)
        if flight is None:
            return None
        self._flights.append(flight)
        self.adapters.copy_planned((load.adapter_id for load in flight.plan.loads), now)
        return flight.plan

    def commit(self, result: StepResult, now: float) -> list[SequenceOutput]:
        """Takes the results of the oldest uncommitted plan. Raises ValueError for those of another."""
        if not self._flights or self._flights[0].plan.step != result.step:
            raise ValueError(f"step {result.step} is not the next to commit")
        flight = self._flights.popleft()
        self._arena.commit(result.step)
        if flight.plan.sequences:
            self.counters.step(result.seconds, flight.plan.tokens, len(flight.plan.sequences))
        return self._committer.commit(flight, result)

    def take_fetches(self) -> list[int]:
        """See AdapterControl.take_fetches."""
        return self.adapters.take_fetches()

    def stats(self, now: float | None = None) -> Stats:
        """Gauges, totals, and what was observed since the last call. Without `now` nothing is said of ages."""
        adapters, retired = self.adapters.catalog.listed, self.adapters.catalog.retired
        counters, chunk_bytes = self.counters, self.config.chunk_bytes
        evictions = {**self._residency.evictions, "prefix/memory": self._memory.prefix_evictions}
        chunks = {str(use): count for use, count in self._arena.counts.items()}
        return counters.take(
            Stats(
                step=self._arena.committed,
                running=len(self._roster.running),
                waiting=self._roster.waiting,
                queue_age=0.0 if now is None else self._roster.oldest_wait(now),
                slots_total=self.config.max_slots,
                slots_used=self._slots.used,
                slots_pinned=sum(a.pinned and a.adapter_id in self._slots.table for a in adapters),
                resident=self._residency.resident,
                tier_bytes={
                    "arena": chunks["adapter"] * chunk_bytes,
                    "host": self._residency.host_pages * chunk_bytes,
                },
                chunks=chunks,
                evictions=evictions,
                adapters=adapter_stats(adapters, self._roster.base, self.config.unix_offset, retired),
            )
        )

    def check(self) -> None:
        """Raises AssertionError unless every part agrees with every other: promises 1 to 3 of the design."""
        sequences = [s for request in self._roster.requests.values() for s in request.choices]
        adapters: list[Adapter] = list(self.adapters.catalog)
        self._arena.check()
        self._blocks.check(s.blocks for s in sequences if s.blocks)
        self.adapters.catalog.check()
        self._residency.check(adapters)
        self._slots.check({a.adapter_id: a.tally.running for a in adapters if a.tally.running})
        self._roster.check()
        running = self._roster.running.values()
        assert all(s.adapter is None or s.adapter.ready for s in running), "a running sequence's adapter is away"
        assert all(len(s.blocks) * self.config.block_tokens >= s.planned for s in running)
        assert len(self._flights) <= MAX_AHEAD

    def _stops(self, command: Submit) -> frozenset[int]:
        own = frozenset(command.params.stop_token_ids)
        return own if command.params.ignore_eos else own | self.config.eos_token_ids

    def _refuse_invalid(self, command: Submit) -> None:
        prompt, output, limit = len(command.prompt), command.params.max_tokens, self.config.max_model_len
        if prompt < 1 or command.n < 1 or output < 0:
            raise EngineError(ErrorCode.INVALID_REQUEST, "a request needs a prompt, a choice and max_tokens from 0")
        if command.priority and self.config.policy != "priority":
            raise EngineError(
                ErrorCode.INVALID_REQUEST, "a priority has a meaning only where --schedule-policy is priority"
            )
        if command.request_id in self._roster.requests:
            raise EngineError(ErrorCode.INVALID_REQUEST, f"request {command.request_id} runs already")
        if prompt + output > limit:
            raise EngineError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the context holds {limit} tokens, but {prompt + output} were requested:"
                f" {prompt} in the prompt and {output} to generate",
            )


def _limits(config: SchedulerConfig) -> Limits:
    most = config.max_slots if config.max_loaded is None else min(config.max_slots, config.max_loaded)
    return Limits(
        max_pins=most - 1,
        max_loaded=config.max_loaded,
        max_host_pages=config.max_host_pages,
        max_adapter_chunks=config.max_adapter_chunks,
        context_blocks=config.context_blocks,
    )

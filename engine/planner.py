"""Builds one step's plan: decodes, then prompts under way, then loads, then admissions. Called by the scheduler.

A sequence is in a plan only if its adapter is resident and stands in a slot. Whoever waits for an adapter or a slot is
passed over; memory stops the queue, so that long prompts are not starved by short ones.
"""

from collections.abc import Collection
from operator import attrgetter

from engine.adapters.adapter import Adapter
from engine.adapters.residency import Residency
from engine.ageing import SlotQueue
from engine.arena import Arena
from engine.blocks import Blocks
from engine.draft import Draft, Flight, PlanLimits, Verdict
from engine.loading import Loading
from engine.memory import Memory
from engine.plan import Admission, SequenceStep, StepPlan
from engine.roster import Roster
from engine.sequence import Sequence, SequenceState
from engine.slots import Slots
from engine.stats import Recorder


class Planner:
    """Decides; holds nothing but who has waited for a slot or for memory, and which steps new prompts spare.

    A step with a prompt takes longer than one without, so prompts that come one by one are put together: behind a step
    that took in everybody who waited, the next ones decode alone. Nobody waits longer than that, and nobody who waits
    for room, a slot or an adapter: as long as somebody does, no step is spared.
    """

    def __init__(
        self,
        limits: PlanLimits,
        arena: Arena,
        blocks: Blocks,
        memory: Memory,
        residency: Residency,
        slots: Slots,
        roster: Roster,
        recorder: Recorder,
    ) -> None:
        self._limits = limits
        self._arena = arena
        self._blocks = blocks
        self._memory = memory
        self._slots = slots
        self._roster = roster
        self._count = recorder.counters
        self._recorder = recorder
        self._spared = 0  # the last step that takes no new prompts in while others decode
        self._slot_queue = SlotQueue(limits.patience, limits.least, roster)
        self._loading = Loading(limits, memory, residency, slots, roster, self._slot_queue, recorder)

    def plan(self, pinned: Collection[Adapter], now: float) -> Flight | None:
        """The next step, or None when there is nothing to do; `pinned` adapters are loaded before all others."""
        draft = Draft(self._arena.planned + 1, self._limits.chunk)
        self._count["slot_reservations"] += self._slot_queue.review(draft.step)
        draft.wanted = self._wanted()
        self._loading.overdue(draft)
        prompts = self._decode(draft)
        draft.budget = max(draft.budget, self._limits.least)
        for sequence in prompts:
            self._continue_prompt(draft, sequence)
        if not draft.tight:
            self._loading.start(draft, pinned)
            if prompts or not draft.rows or draft.step > self._spared:
                self._admit(draft, now)
        if draft.admissions and not self._roster.queue:
            self._spared = draft.step + self._limits.decode_steps
        return self._issue(draft)

    def _wanted(self) -> list[Adapter]:
        """Waiting adapters on the host in queue order, but first the one for which a slot drains."""
        wanted = self._roster.queue.wanted(self._limits.max_wanted, attrgetter("on_host"))
        owner = self._slot_queue.owner
        return wanted if owner is None else [owner, *(adapter for adapter in wanted if adapter is not owner)]

    # Running sequences

    def _decode(self, draft: Draft) -> list[Sequence]:
        """Plans one token for every running sequence that can have one; returns those still in their prompt."""
        prompts = []
        block_tokens = self._blocks.block_tokens
        for sequence in list(self._roster.running.values()):
            if sequence.state is not SequenceState.RUNNING:
                continue
            remaining = sequence.remaining
            if remaining > 1:
                prompts.append(sequence)
            elif remaining and (sequence.planned < len(sequence.blocks) * block_tokens or self._grow(draft, sequence)):
                self._row(draft, sequence, 1)
        return prompts

    def _continue_prompt(self, draft: Draft, sequence: Sequence) -> None:
        length = min(sequence.remaining, draft.budget)
        if sequence.state is SequenceState.RUNNING and length > 0:
            self._row(draft, sequence, length)

    def _grow(self, draft: Draft, sequence: Sequence) -> bool:
        """One more block; where none can be had, the latest admitted is preempted, or the row waits for a commit."""
        alone = len(self._roster.running) == 1  # nobody else's end makes room
        while not (self._obtain_block(draft) or (alone and self._memory.obtain(1))):
            draft.tight = True
            if self._memory.soon() or not self._roster.preempt_latest():
                return False
            self._count["preemptions"] += 1
            if sequence.state is not SequenceState.RUNNING:
                return False
        sequence.blocks += self._blocks.allocate(1)
        return True

    def _obtain_block(self, draft: Draft) -> bool:
        """Who is about to run is asked only where something has to go: rows grow every few steps, each of them."""
        return self._arena.free > 0 or self._memory.obtain(1, self._about_to_run(draft))

    def _about_to_run(self, draft: Draft) -> list[int]:
        """Adapters that the next admission may need: who came later is preempted rather than these evicted again."""
        wanted = [a.adapter_id for a in draft.wanted if a.ready and self._slots.available(a.adapter_id)]
        return [*wanted, *self._loading.queue.kept]

    # Admissions

    def _admit(self, draft: Draft, now: float) -> None:
        frees = bool(self._roster.running)  # else nothing ends that a due load could wait for, and nobody would move
        if not self._roster.free_rows or (frees and self._loading.queue.due(draft.step)):
            return
        scan = self._roster.queue.scan()
        earlier: set[int] = set()
        passed: list[Sequence] = []
        while draft.budget > 0 and self._roster.free_rows and (sequence := scan.head):
            match self._judge(draft, sequence):
                case Verdict.STOP:
                    break
                case Verdict.ADMITTED:
                    if not self._start(draft, sequence, earlier):
                        break
                    scan.take()
                    self._begin(draft, sequence, now)
                case reason:
                    if sequence.adapter is not None:
                        earlier.add(sequence.adapter.adapter_id)
                    if reason is Verdict.NO_SLOT:
                        passed.append(sequence)
                    draft.skips[reason.value] = draft.skips.get(reason.value, 0) + scan.skip_adapter()
        self._slot_queue.passed(passed, draft.step)

    def _judge(self, draft: Draft, sequence: Sequence) -> Verdict:
        """Whether the head may be admitted as far as its adapter is concerned."""
        if sequence.last_step > self._arena.committed:
            return Verdict.STOP  # preempted, and its last step is still under way
        adapter = sequence.adapter
        if adapter is None:
            return Verdict.ADMITTED
        if not adapter.ready:
            slot = self._slots.available(adapter.adapter_id)
            adapter.awaited = adapter.awaited or slot
            return Verdict.NO_SLOT if adapter.on_host and not slot else Verdict.NOT_RESIDENT
        if self._slot_queue.bars(adapter):
            return Verdict.BARRED
        return Verdict.ADMITTED if self._slots.available(adapter.adapter_id) else Verdict.NO_SLOT

    def _start(self, draft: Draft, sequence: Sequence, earlier: Collection[int]) -> bool:
        """Gives the sequence blocks for all its tokens; False, with nothing changed, where there is no room for it."""
        forked = bool(sequence.blocks)
        kept = sequence.blocks if forked else self._find_prefix(sequence)
        cached = len(kept) * self._blocks.block_tokens
        if not self._limits.chunking and len(sequence.tokens) - cached > draft.budget:
            return False
        self._memory.forks.pop(sequence.sequence_id, None)
        if not forked:
            self._blocks.hold(kept)
        need = self._blocks.blocks_for(len(sequence.tokens)) - len(kept)
        own = () if sequence.adapter is None else (sequence.adapter.adapter_id,)
        running = len(self._roster.running)
        spare, protect = -(-running // 4), {*earlier, *own}
        room = self._memory.obtain(need, protect | self._loading.queue.kept, spare)
        if not (room or (not running and self._memory.obtain(need, protect))):
            self._put_back(sequence, kept, forked)
            return False
        self._roster.admit(sequence, kept + self._blocks.allocate(need), cached)
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its tokens; at least the last token is always computed."""
        if sequence.wants_prompt_logprobs:
            return []
        return self._blocks.lookup(sequence.chain, sequence.tokens, len(sequence.tokens) - 1)

    def _put_back(self, sequence: Sequence, kept: list[int], forked: bool) -> None:
        if forked:
            self._memory.forks[sequence.sequence_id] = sequence
        else:
            self._blocks.drop(kept, 0)

    def _begin(self, draft: Draft, sequence: Sequence, now: float) -> None:
        """The admitted sequence's first row."""
        self._note_admission(sequence, now)
        if sequence.adapter is not None:
            self._note_adapter(sequence.adapter)
        draft.admissions.append(
            Admission(
                row=sequence.row,
                sequence_id=sequence.sequence_id,
                tokens=tuple(sequence.tokens),
                prompt_length=sequence.prompt_length,
                choice=sequence.choice,
                params=sequence.params,
            )
        )
        self._row(draft, sequence, min(sequence.remaining, draft.budget))

    def _note_admission(self, sequence: Sequence, now: float) -> None:
        self._count["prefix_query_tokens"] += len(sequence.tokens)
        self._count["prefix_hit_tokens"] += sequence.planned
        if sequence.admission > 1:
            self._count["resumptions"] += 1
            return
        request = sequence.request
        if not request.prompt_done:
            request.cached_tokens = sequence.planned
            self._recorder.queued(now - request.submitted)

    def _note_adapter(self, adapter: Adapter) -> None:
        """A copy of an adapter was a hit where it was done before its sequence's turn came."""
        self._count["prefetch_hits"] += adapter.fresh and not adapter.awaited and not adapter.pinned
        adapter.fresh = adapter.awaited = False

    # The plan

    def _row(self, draft: Draft, sequence: Sequence, length: int) -> None:
        start, blocks, told = sequence.planned, sequence.blocks, sequence.told_blocks
        end, params = start + length, sequence.params
        last = end == len(sequence.tokens) + sequence.pending
        sample = last and params.max_tokens > 0
        self._count["prompt_chunks"] += not last  # parts of prompts that did not fit a step whole
        row = SequenceStep(
            row=sequence.row,
            sequence_id=sequence.sequence_id,
            slot=sequence.slot,
            start=start,
            length=length,
            tokens=tuple(sequence.tokens[start:end]),
            first_new_block=told,
            new_blocks=tuple(blocks[told:]),
            sample=sample,
            output_index=sequence.outputs,
            ban_stops=sequence.outputs < params.min_tokens,
            prompt_logprobs=sequence.wants_prompt_logprobs and start < sequence.prompt_length,
        )
        sequence.planned = end
        sequence.told_blocks = len(blocks)
        sequence.pending += sample
        sequence.outputs += sample
        sequence.last_step = draft.step
        draft.budget -= length
        order = sequence.slot if sequence.slot >= 0 else 1 << 30  # the base last
        draft.rows.append((order, length > 1, sequence.row, row, sequence))

    def _issue(self, draft: Draft) -> Flight | None:
        if not draft.rows and not draft.loads:
            return None
        draft.rows.sort(key=lambda row: row[:3])
        self._arena.planned = draft.step
        if draft.rows:
            self._note_step(draft)
        plan = StepPlan(
            step=draft.step,
            slots=self._slots.table,
            loads=tuple(draft.loads),
            admissions=tuple(draft.admissions),
            sequences=tuple(row[3] for row in draft.rows),
        )
        return Flight(plan, [(row[4], row[4].admission) for row in draft.rows])

    def _note_step(self, draft: Draft) -> None:
        decodes = {order for order, prompt, *_ in draft.rows if not prompt}
        self._count["mixed_adapter_steps"] += len(decodes) > 1
        self._count["mixed_steps"] += bool(decodes) and any(row[1] for row in draft.rows)
        for reason, count in draft.skips.items():
            self._count[f"skips_{reason}"] += count

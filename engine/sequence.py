"""A request's choices and how far each has come. Changed by the scheduler alone."""

import enum
from dataclasses import dataclass, field

from engine.adapters.adapter import Adapter
from engine.blocks import Chain
from engine.messages import Submit
from engine.types import SamplingParams


class SequenceState(enum.Enum):
    HELD = "held"  # waits for the first choice's prompt
    WAITING = "waiting"  # in the queue, new or preempted
    RUNNING = "running"  # has a state row
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """One submitted prompt with its choices."""

    submit: Submit
    adapter: Adapter | None  # None: the base
    arrival: int  # counts from 0 in order of submission
    submitted: float  # seconds
    stops: frozenset[int]  # tokens that end a choice
    choices: list["Sequence"] = field(default_factory=list)  # those that have not ended
    prompt_done: bool = False  # a choice's prompt is committed: the others need not wait
    started: bool = False  # a choice has been in a plan
    cached_tokens: int = 0  # of the prompt, found by the first choice


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice. Token positions below `planned` have their KV in a planned step.

    `pending` tokens are sampled by steps that have not committed; their ids are unknown to the host.
    """

    request: Request
    sequence_id: int
    choice: int
    tokens: list[int]  # prompt and committed output
    chain: Chain
    params: SamplingParams
    prompt_length: int
    adapter: Adapter | None
    state: SequenceState = SequenceState.HELD
    key: tuple[int, ...] = ()  # place in the queue
    passed_since: int = 0  # the step in which it was first passed over for want of a slot; 0: never
    started: bool = False  # it has, or had, KV of its own or shared with it
    row: int = -1
    slot: int = -1
    admission: int = 0  # how often it was admitted; a step of an earlier admission says nothing of today's blocks
    planned: int = 0
    pending: int = 0
    outputs: int = 0  # tokens committed or pending
    blocks: list[int] = field(default_factory=list)
    told_blocks: int = 0  # leading blocks that the worker knows since the admission
    hashed: int = 0  # leading blocks offered to the prefix cache since the admission
    last_step: int = 0  # the last planned step with a row of it
    reports: bool = False  # it is the choice that passes on the prompt's log-probabilities
    reported: int = 0  # prompt tokens whose log-probabilities were passed on
    first_output: bool = True

    @property
    def ended(self) -> bool:
        return self.state is SequenceState.ENDED

    @property
    def remaining(self) -> int:
        """Tokens to compute before nothing is left to plan; 0 when all that it may generate is planned."""
        if self.outputs >= self.params.max_tokens and self.planned >= self.prompt_length:
            return 0
        return len(self.tokens) + self.pending - self.planned

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.reports and self.reported < self.prompt_length

"""A plan in the making, and one on its way. Filled by the planner, kept by the scheduler until it commits."""

import enum
from dataclasses import dataclass, field

from engine.adapters.adapter import Adapter
from engine.plan import AdapterLoad, Admission, SequenceStep, StepPlan
from engine.sequence import Sequence

MAX_AHEAD = 2  # uncommitted plans: the one that runs, and one beyond it


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What bounds a step."""

    chunk: int  # a step's tokens as long as decodes leave some of them to prompts
    least: int  # what prompts get in any case
    chunking: bool  # a prompt may be computed in several steps
    max_wanted: int  # waiting adapters on the host, in queue order, that are copied ahead of a slot
    decode_steps: int  # without new prompts behind a step that left nobody waiting
    prefetch: bool  # adapters are copied before a slot is free for them
    patience: int | None  # steps that a sequence waits before a slot, or a load before memory, is kept for it


class Verdict(enum.Enum):
    """What became of the queue's head."""

    ADMITTED = "admitted"
    NOT_RESIDENT = "not_resident"
    NO_SLOT = "no_slot"
    BARRED = "slot_drains"  # its slot is kept for another
    STOP = "stop"


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    step: int
    budget: int  # tokens left
    rows: list[tuple[int, bool, int, SequenceStep, Sequence]] = field(default_factory=list)
    loads: list[AdapterLoad] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    tight: bool = False  # a running sequence found no block: nothing new is started, no preempted one comes back
    wanted: list[Adapter] = field(default_factory=list)  # on the host, first in the queue
    skips: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that has not committed, with its sequences as they were."""

    plan: StepPlan
    sequences: list[tuple[Sequence, int]]  # aligned with the plan's; the admission each row belongs to

"""Whether an answer given under load is the one that the same adapter gives alone; used by benchmarks.soak.

Batches of other shapes round otherwise in bf16, so greedy answers may part where the two best tokens are close. Up to
that place, and there too, both saw the same tokens, so the log-probabilities of the best ones must agree; after it
nothing can be compared. The bounds come from the demo model in bf16 against float32, 36 such answers of 30 tokens: the
five best tokens' log-probabilities differ by 0.043 in the mean, 0.058 in the worst answer, 0.07 in the worst beginning
of one to three tokens, 0.16 at the worst place. Against another adapter the mean of an answer was 0.11 to 0.76.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

NEAR = 0.5  # nats between the two best tokens of the answer alone; beyond it no other token may be chosen
MEAN = 0.2  # nats; by more the log-probabilities may not differ, in the mean of an answer
FAR = 0.5  # nats; nor in the mean of a place


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer and, at each place, the log-probabilities of the best tokens."""

    tokens: tuple[str, ...]
    best: tuple[dict[str, float], ...]

    @classmethod
    def of(cls, response: dict[str, Any]) -> "Answer":
        """From the body of a completion that asked for logprobs."""
        told = response["choices"][0]["logprobs"]
        return cls(tuple(told["tokens"]), tuple(told["top_logprobs"]))

    def margin(self, place: int) -> float:
        """0 where the best tokens have one text, so that only one of them is told."""
        best = sorted(self.best[place].values(), reverse=True)
        return best[0] - best[1] if len(best) > 1 else 0.0

    def drift(self, other: "Answer", place: int) -> float:
        """Mean difference of the best tokens' log-probabilities; one that is only among the best of one of them counts
        as far as it must differ from the other's last."""
        mine, others = self.best[place], other.best[place]
        return statistics.fmean(_differences(mine, others) + _lacking(others, mine))


def _differences(one: dict[str, float], other: dict[str, float]) -> list[float]:
    """Of the tokens of `one`."""
    return [abs(value - other[token]) for token, value in one.items() if token in other] + _lacking(one, other)


def _lacking(one: dict[str, float], other: dict[str, float]) -> list[float]:
    """Of the tokens of `one` that `other` lacks: its own for them is at most its least."""
    least = min(other.values())
    return [max(0.0, value - least) for token, value in one.items() if token not in other]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one pair of answers."""

    drifts: tuple[float, ...]  # of the places up to and with the one where they part
    near: int  # of these places, those where another token could be excused
    parted: float | None  # the margin where they part; None: same tokens

    @property
    def wrong(self) -> bool:
        apart = self.parted is not None and self.parted > NEAR
        return apart or max(self.drifts) > FAR or self.mean > MEAN

    @property
    def mean(self) -> float:
        return statistics.fmean(self.drifts)


def compare(loaded: Answer, alone: Answer) -> Verdict:
    """Raises ValueError where the answers have not the same length, or none."""
    if len(loaded.tokens) != len(alone.tokens) or not loaded.tokens:
        raise ValueError(f"{len(loaded.tokens)} tokens against {len(alone.tokens)}")
    pairs = enumerate(zip(loaded.tokens, alone.tokens, strict=True))
    parting = next((place for place, (one, other) in pairs if one != other), None)
    places = range(len(loaded.tokens) if parting is None else parting + 1)
    return Verdict(
        drifts=tuple(loaded.drift(alone, place) for place in places),
        near=sum(alone.margin(place) <= NEAR for place in places),
        parted=None if parting is None else alone.margin(parting),
    )


@dataclass(slots=True)
class Tally:
    """All verdicts of a run."""

    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    @property
    def wrong(self) -> int:
        return sum(verdict.wrong for verdict in self.verdicts)

    @property
    def margins(self) -> list[float]:
        """Of the answers that parted."""
        return [verdict.parted for verdict in self.verdicts if verdict.parted is not None]

    @property
    def drifts(self) -> list[float]:
        return [drift for verdict in self.verdicts for drift in verdict.drifts]

    @property
    def near_share(self) -> float:
        """Of the places looked at, how many could have excused another token."""
        places = sum(len(verdict.drifts) for verdict in self.verdicts)
        return sum(verdict.near for verdict in self.verdicts) / places if places else 0.0

"""Judges answers against the reference by teacher forcing: one forward pass over the prompt and our own tokens.

A first token's activations can be so large that the reference's own float32 is off by more than the tolerance. Where a
log-probability differs, the reference is asked again in float64, and that is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.types import SamplingParams, TokenLogprob
from tests.parity.reference import Reference
from tests.support.engine import Answer

TOLERANCE = 1e-3  # of log-probabilities, and the gap of the two best logits below which either may win
MAX_TIES = 0.01  # of all positions
MAX_DOUBTS = 0.01  # of all log-probabilities


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a workload."""

    prompt: list[int]
    adapter: str | None
    params: SamplingParams
    n: int = 1


@dataclass(slots=True)
class Judge:
    """Collects what differs; `verdict` says whether parity holds."""

    reference: Reference
    positions: int = 0
    logprobs: int = 0  # compared
    ties: int = 0  # positions where another token won, as it may: the two best logits are too close
    doubts: int = 0  # log-probabilities where only the reference in float64 agrees with us
    faults: list[str] = field(default_factory=list)

    def greedy(self, ask: Ask, answer: Answer) -> None:
        """Every token the reference's argmax, every log-probability the reference's."""
        logits = self.reference.logits(ask.prompt + answer.tokens, ask.adapter)
        first = len(ask.prompt) - 1
        for index, token in enumerate(answer.tokens):
            self._token(ask, index, token, logits[first + index])
        self._logprobs(ask, answer, "output", answer.tokens, answer.logprobs, first)
        if answer.prompt_logprobs:
            told = answer.prompt_logprobs
            if told[0] is not None or len(told) != len(ask.prompt):
                self._fault(ask, f"{len(told)} log-probabilities of a prompt of {len(ask.prompt)} tokens")
            self._logprobs(ask, answer, "prompt", ask.prompt[1:], told[1:], 0)

    def all_greedy(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
        for ask, answer in zip(asks, answers, strict=True):
            if len(answer.tokens) != ask.params.max_tokens:
                self._fault(ask, f"{len(answer.tokens)} tokens of {ask.params.max_tokens}")
            self.greedy(ask, answer)

    def verdict(self) -> None:
        """Raises AssertionError unless parity holds."""
        assert self.positions, "nothing was judged"
        assert not self.faults, f"{len(self.faults)} faults in {self.positions} positions:\n" + "\n".join(
            self.faults[:20]
        )
        assert self.ties <= MAX_TIES * self.positions, f"{self.ties} near ties in {self.positions} positions"
        assert self.doubts <= MAX_DOUBTS * self.logprobs, f"{self.doubts} doubts in {self.logprobs} log-probabilities"

    def _token(self, ask: Ask, index: int, token: int, logits: Tensor) -> None:
        self.positions += 1
        best = logits.topk(2).values.tolist()
        if token == int(logits.argmax()):
            return
        if best[0] - best[1] < TOLERANCE and best[0] - float(logits[token]) < TOLERANCE:
            self.ties += 1
        else:
            self._fault(ask, f"token {index} is {token}, {best[0] - float(logits[token]):.4f} below the best")

    def _logprobs(
        self,
        ask: Ask,
        answer: Answer,
        what: str,
        tokens: Sequence[int],
        told: Sequence[TokenLogprob | None],
        first: int,
    ) -> None:
        """`told` are those of `tokens`, the first of which follows position `first`."""
        entries = [entry for entry in told if entry is not None]
        if [entry.token for entry in entries] != list(tokens) or len(entries) != len(told):
            self._fault(ask, f"log-probabilities of other tokens than the {what}'s")
            return
        whole = ask.prompt + answer.tokens
        logprobs = self.reference.logits(whole, ask.adapter)[first:].log_softmax(-1)
        differing = self._differing(entries, logprobs)
        if differing:
            exact = self.reference.exact_logits(whole, ask.adapter)[first:].log_softmax(-1)
            wrong = self._differing(entries, exact)
            self.doubts += len({d[:2] for d in differing} - {w[:2] for w in wrong})
            for index, token, difference in wrong:
                self._fault(ask, f"{what} {index}: log-probability of {token} off by {difference:.5f}")

    def _differing(self, entries: Sequence[TokenLogprob], logprobs: Tensor) -> list[tuple[int, int, float]]:
        """(index, token, difference) wherever it is beyond the tolerance."""
        found = []
        for index, entry in enumerate(entries):
            for token, value in [(entry.token, entry.logprob), *entry.top]:
                self.logprobs += 1
                difference = abs(value - float(logprobs[index, token]))
                if not difference <= TOLERANCE:  # NaN must not pass
                    found.append((index, token, difference))
        return found

    def _fault(self, ask: Ask, text: str) -> None:
        self.faults.append(f"{ask.adapter or 'base'}, prompt of {len(ask.prompt)}: {text}")

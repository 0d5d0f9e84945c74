"""Runs a load against a client, and says what came of it: at once, at given times, or by so many streams in turn."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.clients import Answer, Client
from benchmarks.load import Job
from benchmarks.traffic import Arrival


@dataclass(frozen=True, slots=True)
class Outcome:
    """`answers` in the order of sending, those that were cut off among them; times as in Answer."""

    answers: list[Answer]
    start: float
    seconds: float

    def complete(self, after: float = 0.0) -> list[Answer]:
        """Those that ended whole, `after` so many seconds from the start or later."""
        return [answer for answer in self.answers if answer.complete and answer.end >= self.start + after]

    def rate(self, after: float = 0.0) -> float:
        """Complete requests a second."""
        return len(self.complete(after)) / (self.seconds - after)

    def tokens_per_second(self, after: float = 0.0, *, prompts: bool = True) -> float:
        """Of complete requests."""
        done = self.complete(after)
        total = sum(answer.tokens + (len(answer.job.prompt) if prompts else 0) for answer in done)
        return total / (self.seconds - after)

    def first_tokens(self, after: float = 0.0) -> list[float]:
        """Milliseconds from sending to the first token."""
        return [(answer.first - answer.sent) * 1e3 for answer in self.complete(after)]

    def gaps(self, after: float = 0.0, before: float | None = None) -> list[float]:
        """Milliseconds between the events of a stream, those that begin in the window (seconds from the start)."""
        first = self.start + after
        last = float("inf") if before is None else self.start + before
        return [
            (b - a) * 1e3
            for answer in self.answers
            for a, b in zip(answer.times, answer.times[1:], strict=False)
            if first <= a <= last
        ]

    def streams(self, after: float = 0.0, points: int = 200) -> float:
        """The median number of streams between their first and last token."""
        moments = [self.start + after + (self.seconds - after) * (i + 0.5) / points for i in range(points)]
        spans = [(answer.first, answer.end) for answer in self.answers if answer.times]
        return statistics.median(sum(a <= moment <= b for a, b in spans) for moment in moments)


async def at_once(client: Client, jobs: Sequence[Job]) -> Outcome:
    """Sends all and waits for all. Raises what any of them failed with."""
    return await at_times(client, [Arrival(0.0, job) for job in jobs])


async def at_times(client: Client, arrivals: Sequence[Arrival], seconds: float | None = None) -> Outcome:
    """Sends each at its time; what is unfinished after `seconds` is left. Raises what any failed with."""
    start = time.perf_counter()
    answers: list[Answer] = []
    tasks: list[asyncio.Task[None]] = []
    for arrival in arrivals:
        if (wait := start + arrival.at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        answers.append(Answer(arrival.job, time.perf_counter()))
        tasks.append(asyncio.create_task(client.answer(arrival.job, answers[-1])))
    rest = None if seconds is None else max(0.0, start + seconds - time.perf_counter())
    await finished(tasks, rest)
    end = time.perf_counter() if seconds is None else start + seconds
    return Outcome(answers, start, end - start)


async def in_turn(client: Client, jobs: Iterator[Job], streams: int, seconds: float) -> Outcome:
    """So many streams, each sending its next job when the last has ended, for `seconds`."""
    start = time.perf_counter()
    answers: list[Answer] = []

    async def stream() -> None:
        while True:
            answers.append(answer := Answer(next(jobs), time.perf_counter()))
            await client.answer(answer.job, answer)

    await finished([asyncio.create_task(stream()) for _ in range(streams)], seconds)
    return Outcome(answers, start, seconds)


async def finished(tasks: Sequence["asyncio.Task[None]"], seconds: float | None) -> None:
    """Waits so long and ends the rest; raises what any failed with, as soon as it does."""
    done, rest = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION) if tasks else ((), ())
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    for task in done:
        task.result()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

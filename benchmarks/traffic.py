"""Loads as data: when requests arrive, which adapter each names, how long it is. No clock, no network, no torch.

The same seed gives the same load, so that two servers meet the same requests.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.load import Job

BASE = ""  # the model of a job that names no adapter
Bounds = tuple[int, int]  # inclusive


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job and when it is sent, in seconds from the load's start."""

    at: float
    job: Job


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompts and outputs, uniform in their bounds; `vocab`: ids are drawn below it."""

    prompt: Bounds
    output: Bounds
    vocab: int

    @property
    def mean_tokens(self) -> float:
        return (sum(self.prompt) + sum(self.output)) / 2


def arrival_times(rate: float, cv: float, seed: int) -> Iterator[float]:
    """Seconds. Gaps are gamma distributed with mean 1 / rate and coefficient of variation `cv`; 1 is Poisson."""
    draw, now = random.Random(seed), 0.0
    shape = 1 / cv**2
    while True:
        now += draw.gammavariate(shape, 1 / (rate * shape))
        yield now


def zipf(models: Sequence[str], alpha: float, seed: int) -> Iterator[str]:
    """The i-th model, from 1, with a chance that goes with i ** -alpha; 0 is uniform."""
    draw = random.Random(seed)
    weights = list(itertools.accumulate((i + 1) ** -alpha for i in range(len(models))))
    while True:
        yield draw.choices(models, cum_weights=weights)[0]


def make_jobs(models: Iterator[str], lengths: Lengths, seed: int) -> Iterator[Job]:
    draw = random.Random(seed)
    for model in models:
        prompt = tuple(draw.choices(range(lengths.vocab), k=draw.randint(*lengths.prompt)))
        yield Job(model, prompt, draw.randint(*lengths.output))


def staggered(jobs: Iterator[Job], streams: int) -> Iterator[Job]:
    """The first job of each stream is cut to another length: jobs alike would all end at once, round after round."""
    for place, job in enumerate(itertools.islice(jobs, streams), 1):
        yield replace(job, output=-(-job.output * place // streams))
    yield from jobs


def until(seconds: float, times: Iterator[float], jobs: Iterator[Job]) -> list[Arrival]:
    """What arrives before `seconds`."""
    arrivals = []
    for at, job in zip(times, jobs, strict=False):
        if at >= seconds:
            break
        arrivals.append(Arrival(at, job))
    return arrivals

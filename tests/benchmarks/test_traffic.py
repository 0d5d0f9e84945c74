"""Loads as data: rates, spread, popularity, repeatability."""

import itertools
import statistics

import pytest

from benchmarks.traffic import Lengths, arrival_times, make_jobs, staggered, until, zipf

LENGTHS = Lengths((8, 512), (8, 512), 1000)


@pytest.mark.parametrize("cv", [1.0, 2.0, 0.5])
def test_gaps_have_the_rate_and_the_spread(cv: float) -> None:
    times = list(itertools.islice(arrival_times(50.0, cv, seed=1), 20_000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)


def test_popularity_falls_with_the_rank() -> None:
    names = ["a", "b", "c", "d"]
    drawn = list(itertools.islice(zipf(names, 1.0, seed=1), 20_000))
    counts = [drawn.count(name) for name in names]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.1)
    assert counts[0] / counts[3] == pytest.approx(4, rel=0.1)
    even = list(itertools.islice(zipf(names, 0.0, seed=1), 20_000))
    assert even.count("d") == pytest.approx(5000, rel=0.1)


def test_lengths_are_uniform_in_their_bounds() -> None:
    jobs = list(itertools.islice(make_jobs(itertools.repeat("a"), LENGTHS, seed=1), 2000))
    for values in ([len(job.prompt) for job in jobs], [job.output for job in jobs]):
        assert 8 <= min(values) < 20
        assert 500 < max(values) <= 512
        assert statistics.mean(values) == pytest.approx(260, rel=0.05)
    assert all(0 <= token < 1000 for job in jobs for token in job.prompt)


def test_a_load_repeats_itself_and_ends_in_time() -> None:
    def load(seed: int) -> list[object]:
        return [*until(5.0, arrival_times(20.0, 1.0, seed), make_jobs(zipf(["a", "b"], 1.0, seed), LENGTHS, seed))]

    assert load(1) == load(1) != load(2)
    assert 60 < len(load(1)) < 140
    assert (
        max(arrival.at for arrival in until(5.0, arrival_times(20.0, 1.0, 1), make_jobs(zipf(["a"], 1, 1), LENGTHS, 1)))
        < 5
    )


def test_streams_of_jobs_alike_do_not_end_together() -> None:
    alike = make_jobs(itertools.repeat("a"), Lengths((8, 8), (128, 128), 1000), seed=1)
    outputs = [job.output for job in itertools.islice(staggered(alike, 256), 600)]
    assert outputs[:256] == sorted(outputs[:256])
    assert (outputs[0], outputs[127], outputs[255]) == (1, 64, 128)
    assert set(outputs[256:]) == {128}

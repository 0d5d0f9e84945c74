"""Drawing against a plain reference in Python floats, and against the probabilities it should follow."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.worker.draw import HEAD, DrawParams, draw, threshold
from engine.worker.noise import uniform


def params(count: int, temperature: float, top_k: int, top_p: float, min_p: float, u: Sequence[float]) -> DrawParams:
    return DrawParams(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        uniform=torch.tensor(u, dtype=torch.float64),
    )


def kept(logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Probability of each token that the filters leave: top-k, then top-p of what that leaves, then min-p."""
    most = max(logits)
    weights = [math.exp((x - most) / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        total, seen = sum(weights[i] for i in order), 0.0
        for count, token in enumerate(order, 1):
            seen += weights[token]
            if seen >= top_p * total:
                order = order[:count]
                break
    order = [i for i in order if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in order)
    return {i: weights[i] / total for i in sorted(order)}


def reference(logits: Sequence[float], u: float, *filters: float) -> int:
    left = kept(logits, *filters)  # type: ignore[arg-type]
    seen = 0.0
    for token, probability in left.items():
        seen += probability
        if seen > u:
            return token
    return max(left)


CASES = [(t, k, p, m) for t in (0.3, 1.0, 2.0) for k in (0, 1, 7, 400) for p in (1.0, 0.5, 0.95) for m in (0.0, 0.05)]


@pytest.mark.parametrize("vocab", [40, 3 * HEAD])
@pytest.mark.parametrize("case", CASES)
def test_draw_matches_reference(vocab: int, case: tuple[float, int, float, float]) -> None:
    rng = random.Random(vocab)
    logits = [[rng.gauss(0, 3) for _ in range(vocab)] for _ in range(5)]
    u = [0.0, 0.2, 0.5, 0.9, 0.999]
    drawn = draw(torch.tensor(logits), params(5, *case, u)).tolist()
    assert drawn == [reference(row, x, *case) for row, x in zip(logits, u, strict=True)]


def test_rows_do_not_depend_on_each_other() -> None:
    torch.manual_seed(1)
    logits = torch.randn(70, 1000) * 2
    mixed = DrawParams(
        temperature=torch.rand(70) + 0.2,
        top_k=torch.randint(0, 500, (70,)) * torch.randint(0, 2, (70,)),
        top_p=torch.rand(70) * 0.7 + 0.3,
        min_p=torch.rand(70) * 0.1,
        uniform=torch.rand(70, dtype=torch.float64),
    )
    together = draw(logits.clone(), mixed)
    alone = torch.cat([draw(logits[i : i + 1].clone(), mixed.rows(slice(i, i + 1))) for i in range(70)])
    assert torch.equal(together, alone)


def test_flat_rows_are_sorted_whole() -> None:
    """Top-p over a row so flat that its head does not reach the share."""
    probs = torch.full((1, 4 * HEAD), 1 / (4 * HEAD))
    assert threshold(probs, params(1, 1.0, 0, 0.9, 0.0, [0.0])).item() == pytest.approx(1 / (4 * HEAD))


def test_equal_tokens_share_their_fate() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, -5.0]])
    assert {int(draw(logits.clone(), params(1, 1.0, 1, 1.0, 0.0, [u]))) for u in (0.1, 0.5, 0.9)} == {0, 1, 2}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-48])
def test_never_draws_what_is_impossible(u: float) -> None:
    logits = torch.full((1, 600), float("-inf"))
    logits[0, 300:310] = 0.0
    token = int(draw(logits, params(1, 1.0, 0, 1.0, 0.0, [u])))
    assert token == (300 if u == 0 else 309)


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 50) * 10
    drawn = draw(logits.clone(), params(4, 1e-6, 0, 1.0, 0.0, [0.1, 0.4, 0.7, 0.99]))
    assert torch.equal(drawn, logits.argmax(-1))


def test_frequencies_follow_probabilities() -> None:
    """Chi-squared over 20,000 draws of one row with the server's own noise, 9 degrees of freedom, p = 1e-4."""
    logits = torch.linspace(-2, 2, 10)
    count, counts = 20_000, torch.zeros(10)
    for first in range(0, count, 500):
        noise = [uniform(42, 0, index) for index in range(first, first + 500)]
        counts += draw(logits.repeat(500, 1), params(500, 0.8, 0, 1.0, 0.0, noise)).bincount(minlength=10)
    expected = (logits / 0.8).softmax(-1) * count
    assert float(((counts - expected) ** 2 / expected).sum()) < 33.7


def test_noise_is_uniform_and_keyed() -> None:
    values: Tensor = torch.tensor(
        [uniform(s, c, i) for s in range(20) for c in range(20) for i in range(50)], dtype=torch.float64
    )
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert values.histc(10, 0, 1).sub(2000).abs().max() < 200
    assert len(set(values.tolist())) == 20_000
    assert len({uniform(1, 2, 3), uniform(2, 1, 3), uniform(1, 3, 2), uniform(3, 2, 1), uniform(2**63 - 1, 2, 3)}) == 5


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 0.5, 0.1)])
@pytest.mark.parametrize("vocab", [40, 3 * HEAD])
def test_rows_without_sense_still_get_a_token(vocab: int, top_k: int, top_p: float, min_p: float) -> None:
    """NaN and infinite logits, as a broken adapter makes them, or nothing that is allowed: no index is out of range."""
    logits = torch.randn(6, vocab)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4, 1:] = float("-inf")
    tokens = draw(logits.clone(), params(6, 1.0, top_k, top_p, min_p, [0.999] * 6))
    assert ((tokens >= 0) & (tokens < vocab)).all()
    assert tokens[4] == 0
    assert tokens[5] == draw(logits[5:], params(1, 1.0, top_k, top_p, min_p, [0.999]))[0]

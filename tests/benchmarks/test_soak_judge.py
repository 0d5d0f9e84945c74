"""What the soak calls the same answer, and what it does not."""

import pytest

from benchmarks.soak_judge import FAR, MEAN, NEAR, Answer, Tally, compare

Place = tuple[str, dict[str, float]]


def answer(*places: Place) -> Answer:
    tokens, best = zip(*places, strict=True)
    return Answer(tokens, best)


def sure(token: str, logprob: float = -0.1) -> Place:
    return token, {token: logprob, "other": logprob - 3}


def test_equal_answers() -> None:
    one = answer(sure("a"), sure("b"))
    verdict = compare(one, one)
    assert not verdict.wrong
    assert (verdict.drifts, verdict.near, verdict.parted) == ((0.0, 0.0), 0, None)


def test_they_may_part_at_a_near_tie_and_nothing_after_it_counts() -> None:
    tie = {"b": -0.7, "c": -0.7 - NEAR / 2}
    loaded = answer(sure("a"), ("c", tie), sure("x"))
    alone = answer(sure("a"), ("b", tie), sure("y"))
    verdict = compare(loaded, alone)
    assert not verdict.wrong
    assert len(verdict.drifts) == 2
    assert verdict.near == 1
    assert verdict.parted == pytest.approx(NEAR / 2)


def test_another_token_where_the_margin_is_wide() -> None:
    clear = {"b": -0.5, "c": -0.5 - 2 * NEAR}
    assert compare(answer(("c", clear)), answer(("b", clear))).wrong


def test_a_tie_that_the_other_does_not_know() -> None:
    """Both are near ties, but of other tokens."""
    loaded = answer(("x", {"x": -0.7, "y": -0.7, "z": -4}))
    alone = answer(("b", {"b": -0.7, "c": -0.7, "d": -4}))
    assert compare(loaded, alone).wrong


def test_same_tokens_with_another_probability() -> None:
    assert compare(answer(sure("a", -0.1)), answer(sure("a", -0.15 - MEAN))).wrong
    few, many = [sure("a", -0.1 - 2 * FAR), *[sure("a")] * 20], [sure("a")] * 21
    assert compare(answer(*few), answer(*many)).mean < MEAN
    assert compare(answer(*few), answer(*many)).wrong  # one place is too far off
    assert not compare(answer(*[sure("a", -0.1 - MEAN / 2)] * 21), answer(*many)).wrong


def test_a_token_that_one_of_them_does_not_tell() -> None:
    """It counts from the other's last one on: by how much it differs at least."""
    one, other = answer(("a", {"a": -0.5, "b": -1.0})), answer(("a", {"a": -0.5, "c": -1.4}))
    assert one.drift(other, 0) == pytest.approx((0.0 + 0.4 + 0.0) / 3)
    assert other.drift(one, 0) == pytest.approx((0.0 + 0.4 + 0.0) / 3)


def test_tokens_of_one_text_are_a_near_tie() -> None:
    assert answer(("?", {"?": -0.3})).margin(0) == 0.0


@pytest.mark.parametrize("places", [0, 2])
def test_answers_of_other_lengths_are_refused(places: int) -> None:
    with pytest.raises(ValueError, match="tokens against"):
        compare(Answer(("a",) * places, ({"a": 0.0},) * places), Answer((), ()) if not places else answer(sure("a")))


def test_the_tally_counts() -> None:
    tie = {"b": -0.7, "c": -0.8}
    tally = Tally()
    tally.add(compare(answer(sure("a"), ("c", tie)), answer(sure("a"), ("b", tie))))
    tally.add(compare(answer(sure("a")), answer(sure("b"))))
    assert tally.wrong == 1
    assert len(tally.margins) == 2
    assert tally.near_share == pytest.approx(1 / 3)


def test_of_a_completion() -> None:
    told = {"tokens": ["a"], "top_logprobs": [{"a": -0.5, "b": -1.0}]}
    made = Answer.of({"choices": [{"logprobs": told}]})
    assert made == Answer(("a",), ({"a": -0.5, "b": -1.0},))
    assert made.margin(0) == pytest.approx(0.5)

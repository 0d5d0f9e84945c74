"""The sampler's edits of logits and its state between steps."""

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine.plan import Admission, SequenceStep
from engine.types import SamplingParams
from engine.worker.rows import Rows, make_rows
from engine.worker.sampler import Sampler

VOCAB, EOS = 20, 2
GREEDY = SamplingParams(max_tokens=8, seed=3, temperature=0.0)


class Bench:
    """A sampler with rows admitted on demand."""

    def __init__(self) -> None:
        device = torch.device("cpu")
        self.rows: Rows = make_rows(8, 4, device)
        self.sampler = Sampler(self.rows, 8, VOCAB, [EOS], device)

    def admit(self, row: int, prompt: tuple[int, ...], output: tuple[int, ...] = (), **params: Any) -> None:
        merged = msgspec.structs.replace(GREEDY, **params)
        admission = Admission(row, row + 100, prompt + output, len(prompt), 0, merged)
        self.rows.admit(admission)
        self.sampler.admit(admission)

    def sample(self, rows: list[int], logits: Tensor, index: int = 0, ban: bool = False, **kwargs: Any) -> list[int]:
        steps = [SequenceStep(r, r + 100, -1, 4, 1, (), 0, (), True, index, ban) for r in rows]
        masks, force = kwargs.get("masks"), kwargs.get("force")
        return self.sampler.sample(steps, logits.clone(), masks, force).tolist()


def rising(rows: int = 1) -> Tensor:
    return torch.arange(VOCAB, dtype=torch.float32).repeat(rows, 1)


def test_greedy_takes_the_largest_and_remembers_it() -> None:
    bench = Bench()
    bench.admit(3, (1,))
    assert bench.sample([3], rising()) == [VOCAB - 1]
    assert bench.rows.last_token[3] == VOCAB - 1


def test_logit_bias_and_forbidden_tokens() -> None:
    bench = Bench()
    bench.admit(0, (1,), logit_bias={4: 100.0})
    bench.admit(1, (1,), logit_bias={VOCAB - 1: -100.0})
    assert bench.sample([0, 1], rising(2)) == [4, VOCAB - 2]


def test_stops_are_banned_while_asked() -> None:
    bench, logits = Bench(), rising()
    logits[0, [EOS, 7]] = torch.tensor([90.0, 80.0])
    bench.admit(0, (1,), stop_token_ids=(7,))
    assert bench.sample([0], logits, ban=True) == [VOCAB - 1]
    assert bench.sample([0], logits) == [EOS]


def test_repetition_counts_prompt_and_output() -> None:
    bench = Bench()
    bench.admit(0, (19, 18), (17,), repetition_penalty=2.0)
    assert bench.sample([0], rising()) == [16]
    assert bench.sample([0], rising()) == [15]  # 16 is in the output now: 8


def test_repetition_pushes_negative_logits_down() -> None:
    bench = Bench()
    bench.admit(0, (19,), repetition_penalty=3.0)
    assert bench.sample([0], rising() - 20.5) == [18]


def test_presence_and_frequency_count_the_output_only() -> None:
    bench = Bench()
    bench.admit(0, (19, 19), (18, 18), presence_penalty=0.6)
    assert bench.sample([0], rising()) == [19]
    bench.admit(1, (19,), (19, 19), frequency_penalty=0.6)
    assert bench.sample([1], rising()) == [18]  # 19 - 1.2
    bench.admit(2, (19,), (19,), frequency_penalty=0.6)
    assert bench.sample([2], rising()) == [19]  # 19 - 0.6
    assert bench.sample([2], rising()) == [18]  # 19 - 1.2


def test_admission_forgets_the_row_before() -> None:
    bench = Bench()
    bench.admit(0, (1,), (19,), presence_penalty=2.0)
    assert bench.sample([0], rising()) == [18]
    bench.admit(0, (1,), presence_penalty=2.0)
    assert bench.sample([0], rising()) == [19]


def test_masks_and_forced_tokens() -> None:
    bench, allowed = Bench(), torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[3, 5]] = True
    bench.admit(0, (1,))
    bench.admit(1, (1,))
    assert bench.sample([0, 1], rising(2), masks={100: allowed}, force={101: 9}) == [5, 9]
    assert bench.rows.last_token[1] == 9


def test_noise_depends_on_seed_choice_and_index_alone() -> None:
    bench, flat = Bench(), torch.zeros(1, VOCAB)
    for row in range(4):
        bench.admit(row, (1,), temperature=1.0, seed=5)
    alone = [bench.sample([2], flat, index)[0] for index in range(30)]
    together = [bench.sample([0, 2, 3], flat.repeat(3, 1), index)[1] for index in range(30)]
    assert alone == together
    assert len(set(alone)) > 10
    bench.admit(1, (1,), temperature=1.0, seed=6)
    assert [bench.sample([1], flat, index)[0] for index in range(30)] != alone


@pytest.mark.parametrize("greedy_first", [True, False])
def test_greedy_and_random_rows_share_a_batch(greedy_first: bool) -> None:
    bench = Bench()
    bench.admit(0, (1,), temperature=0.0 if greedy_first else 1.0, top_k=2)
    bench.admit(1, (1,), temperature=1.0 if greedy_first else 0.0, top_k=2)
    for index in range(20):
        tokens = bench.sample([0, 1], rising(2) * 0.01, index)
        assert tokens[0 if greedy_first else 1] == VOCAB - 1
        assert tokens[1 if greedy_first else 0] >= VOCAB - 2


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-30])
def test_temperatures_down_to_nothing_are_greedy(temperature: float) -> None:
    """Also those that float32 cannot tell from 0."""
    bench = Bench()
    bench.admit(0, (1,), temperature=temperature)
    assert bench.sample([0], rising()) == [VOCAB - 1]

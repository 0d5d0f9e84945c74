"""The kernels at a step's ends: tables, embeddings and rows for the head; penalties, edits and the draw."""

import numpy as np
import pytest
import torch

from engine.worker.draw import DrawParams, draw
from kernels.lora_meta import PackedLayout
from kernels.sample import edit, penalize, sample
from kernels.step_input import embed, pick_rows, update_tables
from kernels.step_meta import (
    EDITS,
    EDITS_AT,
    FREQUENCY,
    MIN_P,
    NOISE_HIGH,
    NOISE_LOW,
    PENALIZED,
    PRESENCE,
    REPETITION,
    ROW,
    SAMPLE_INTS,
    SAMPLES,
    STATE,
    STEP_INTS,
    TABLE_UPDATES,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    bits,
    step_fields,
)


def ints(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def header(device: torch.device, **counts: int) -> torch.Tensor:
    places = {"updates": TABLE_UPDATES, "edits": EDITS, "edits_at": EDITS_AT, "samples": SAMPLES}
    step = torch.zeros(STEP_INTS, dtype=torch.int32)
    for name, count in counts.items():
        step[places[name]] = count
    return step.to(device)


def test_fields_are_as_the_kernels_read_them() -> None:
    layout = PackedLayout((("counts", (8,)), *step_fields(3, 2)))
    assert {name: tuple(view.shape) for name, view in layout.split(torch.zeros(layout.size)).items()} == {
        "counts": (8,), "step": (4,), "ids": (3,), "positions": (3,), "locations": (3,), "samples": (2, SAMPLE_INTS),
    }  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 700])
def test_update_tables(count: int, device: torch.device) -> None:
    torch.manual_seed(0)
    tables = torch.randint(1000, (30, 40), dtype=torch.int32)
    places = torch.randperm(tables.numel())[:count]
    values = torch.randint(1000, (count,))
    wanted = tables.clone()
    wanted.view(-1)[places] = values.int()
    tail = torch.cat([torch.stack([places, values], 1).view(-1), torch.full((6,), 3)]).int()  # stale behind the end
    tables = tables.to(device)
    update_tables(tables, header(device, updates=count), tail.to(device))
    assert torch.equal(tables.cpu(), wanted)


def test_embed(device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 1100, device=device).to(dtype)
    last = torch.tensor([7, 49, 0], device=device)
    out = torch.empty(5, 1100, dtype=dtype, device=device)
    embed(out, weight, ints([3, -1, 49, -2, -3], device), last)
    assert torch.equal(out, weight[torch.tensor([3, 7, 49, 49, 0])])


def test_pick_rows(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(6, 1100, device=device).to(dtype)
    out = torch.full((4, 1100), 7.0, dtype=dtype, device=device)
    lines = torch.zeros(4, SAMPLE_INTS, dtype=torch.int32)
    lines[:, ROW] = torch.tensor([5, 0, 2**30, 2**30])
    pick_rows(out, x, header(device, samples=2), lines.to(device))
    assert torch.equal(out[:2], x[[5, 0]])
    assert (out[2:] == 7.0).all()


def lines_of(rows: int, **columns: object) -> torch.Tensor:
    names = {
        "state": STATE, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P,
        "high": NOISE_HIGH, "low": NOISE_LOW, "repetition": REPETITION, "frequency": FREQUENCY, "presence": PRESENCE,
        "penalized": PENALIZED,
    }  # fmt: skip
    lines = np.zeros((rows, SAMPLE_INTS), np.int32)
    lines[:, TOP_P] = bits([1.0])
    lines[:, STATE] = np.arange(rows)
    for name, values in columns.items():
        given = np.asarray(values)
        lines[:, names[name]] = given if given.dtype.kind == "i" else given.astype(np.float32).view(np.int32)
    return torch.from_numpy(lines)


def test_penalties(device: torch.device) -> None:
    torch.manual_seed(1)
    vocab = 300
    logits, tally = torch.randn(3, vocab), torch.randint(4, (5, vocab), dtype=torch.int32)
    lines = lines_of(3, state=[4, 0, 2], penalized=[1, 0, 1], repetition=[1.5, 1.0, 1.0], frequency=[0.25, 0.0, 0.5],
                     presence=[0.5, 0.0, -1.0])  # fmt: skip
    wanted = logits.clone()
    for row, state, repetition, frequency, presence in ((0, 4, 1.5, 0.25, 0.5), (2, 2, 1.0, 0.5, -1.0)):
        count, value = tally[state] // 2, wanted[row]
        repeated = torch.where(value > 0, value / repetition, value * repetition)
        value = torch.where(tally[state] > 0, repeated, value)
        wanted[row] = value - frequency * count - presence * (count > 0)
    out = logits.to(device)
    penalize(out, tally.to(device), header(device, samples=3), lines.to(device))
    torch.testing.assert_close(out.cpu(), wanted)


def test_edits(device: torch.device) -> None:
    logits = torch.zeros(3, 10)
    edits = [[0, 4, int(bits([2.5])[0]), 0], [2, 9, int(bits([float("-inf")])[0]), 0], [2, 0, int(bits([-1.0])[0]), 0]]
    tail = ints([9, 9, *(number for line in edits for number in line), 1, 1, 1], device)
    out = logits.to(device)
    edit(out, header(device, edits=3, edits_at=2), tail)
    logits[0, 4], logits[2, 9], logits[2, 0] = 2.5, float("-inf"), -1.0
    assert torch.equal(out.cpu(), logits)


def run_sample(logits: torch.Tensor, lines: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, tally afterwards); every token must become its state row's last one."""
    rows, vocab = logits.shape
    tokens = torch.full((rows,), -5, dtype=torch.int32, device=device)
    last = torch.full((rows,), -5, dtype=torch.int64, device=device)
    tally = torch.zeros(rows, vocab, dtype=torch.int32, device=device)
    forced = torch.full((rows,), -1, dtype=torch.int32, device=device)
    sample(tokens, last, tally, logits.to(device), forced, header(device, samples=rows), lines.to(device))
    assert torch.equal(last, tokens.long())
    return tokens.cpu(), tally.cpu()


def test_greedy_takes_the_first_of_the_largest(device: torch.device) -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 5000)
    logits[1, [4999, 17, 4200]] = 9.0
    logits[2, :] = float("-inf")
    logits[3, 4998] = 9.0
    tokens, _ = run_sample(logits, lines_of(4), device)
    assert tokens.tolist() == [int(logits[0].argmax()), 17, 0, 4998]


def test_draws_are_those_of_the_torch_sampler(device: torch.device) -> None:
    """Every mixture of filters; noise that falls on a boundary is too rare to be drawn here."""
    generator = np.random.default_rng(3)
    rows, vocab = 12, 4200
    logits = torch.from_numpy(generator.normal(0, 3, (rows, vocab)).astype(np.float32))
    logits[4] = logits[4].round()  # many ties
    temperature = generator.choice([0.3, 1.0, 1.7], rows)
    top_k = generator.choice([0, 1, 5, 400, 9000], rows)
    top_p = generator.choice([1.0, 0.9, 0.3], rows)
    min_p = generator.choice([0.0, 0.05], rows)
    noise = generator.integers(0, 1 << 48, rows)
    lines = lines_of(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, high=noise >> 24,
                     low=noise & 0xFFFFFF, penalized=(np.arange(rows) % 2))  # fmt: skip
    params = DrawParams(
        torch.from_numpy(temperature.astype(np.float32)),
        torch.from_numpy(np.minimum(top_k, vocab)),
        torch.from_numpy(top_p.astype(np.float32)),
        torch.from_numpy(min_p.astype(np.float32)),
        torch.from_numpy(noise / float(1 << 48)),
    )
    tokens, tally = run_sample(logits, lines, device)
    assert tokens.tolist() == draw(logits.clone(), params).tolist()
    wanted = torch.zeros_like(tally)
    wanted[torch.arange(1, rows, 2), tokens[1::2].long()] = 2
    assert torch.equal(tally, wanted)

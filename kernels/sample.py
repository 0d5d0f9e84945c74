"""From logits to tokens: penalties, edits, then one token a row, greedy or drawn. Nothing waits for the host.

The draw is engine.worker.draw's: filters keep every token whose probability reaches the threshold they find, and the
cumulated probabilities are inverted at the row's noise. Thresholds are found by bisection over the bits of a float32.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

import triton
import triton.language as tl
from torch import Tensor

from kernels import step_meta
from kernels.launch import cdiv, require

EDIT_BLOCK, EDIT_PROGRAMS = 128, 4
PENALTY_BLOCK = 4096
SAMPLE_BLOCK = 4096
ONE = 0x3F800000  # bits of 1.0


@triton.jit
def _penalize(
    logits, tally, step, samples, vocab, logits_stride, tally_stride,
    SAMPLES: tl.constexpr, INTS: tl.constexpr, STATE: tl.constexpr, PENALIZED: tl.constexpr, REPETITION: tl.constexpr,
    FREQUENCY: tl.constexpr, PRESENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    if sample < tl.load(step + SAMPLES):
        line = samples + sample * INTS
        if tl.load(line + PENALIZED) > 0:
            repetition = tl.load(line + REPETITION).to(tl.float32, bitcast=True)
            frequency = tl.load(line + FREQUENCY).to(tl.float32, bitcast=True)
            presence = tl.load(line + PRESENCE).to(tl.float32, bitcast=True)
            i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            seen = tl.load(tally + tl.load(line + STATE).to(tl.int64) * tally_stride + i, mask=i < vocab, other=0)
            at = logits + tl.cast(sample, tl.int64) * logits_stride + i
            value = tl.load(at, mask=i < vocab, other=0.0)
            repeated = tl.where(value > 0, value / repetition, value * repetition)
            value = tl.where(seen > 0, repeated, value)
            count = seen >> 1
            value = value - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
            tl.store(at, value, mask=i < vocab)


def penalize(logits: Tensor, tally: Tensor, step: Tensor, samples: Tensor) -> None:
    """logits: [samples, vocab] float32; tally: [state rows, vocab] int32, twice a token's count in the output, plus 1
    where the prompt has it.

    Semantics, for each sample with PENALIZED set: l = l / repetition if l > 0 else l * repetition where the tally is
    above 0; l -= frequency * count + presence * (count > 0).
    """
    rows, vocab = logits.shape
    require(tally.shape[1] == vocab, "tally and logits differ in vocabulary")
    _penalize[(rows, cdiv(vocab, PENALTY_BLOCK))](
        logits, tally, step, samples, vocab, logits.stride(0), tally.stride(0),
        SAMPLES=step_meta.SAMPLES, INTS=step_meta.SAMPLE_INTS, STATE=step_meta.STATE, PENALIZED=step_meta.PENALIZED,
        REPETITION=step_meta.REPETITION, FREQUENCY=step_meta.FREQUENCY, PRESENCE=step_meta.PRESENCE,
        BLOCK=PENALTY_BLOCK,
    )  # fmt: skip


@triton.jit
def _edit(
    logits, step, tail, logits_stride,
    COUNT: tl.constexpr, AT: tl.constexpr, INTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(step + COUNT)
    edits = tail + tl.load(step + AT)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < count
        sample = tl.load(edits + i * INTS, mask=mask, other=0).to(tl.int64)
        token = tl.load(edits + i * INTS + 1, mask=mask, other=0)
        more = tl.load(edits + i * INTS + 2, mask=mask, other=0).to(tl.float32, bitcast=True)
        at = logits + sample * logits_stride + token
        tl.store(at, tl.load(at, mask=mask, other=0.0) + more, mask=mask)


def edit(logits: Tensor, step: Tensor, tail: Tensor) -> None:
    """logits: [samples, vocab] float32; tail: [any] int32.

    Semantics: logits[e[0], e[1]] += float(e[2]) for each of the step[EDITS] lines e of EDIT_INTS that start at
    tail[step[EDITS_AT]]; no place is met twice.
    """
    _edit[(EDIT_PROGRAMS,)](
        logits, step, tail, logits.stride(0),
        COUNT=step_meta.EDITS, AT=step_meta.EDITS_AT, INTS=step_meta.EDIT_INTS, BLOCK=EDIT_BLOCK,
    )  # fmt: skip


@triton.jit
def _weights(line, i, vocab, most, temperature):
    """Probabilities but for their sum: the most likely token's is 1."""
    value = tl.load(line + i, mask=i < vocab, other=float("-inf"))
    return tl.exp((value - most) / temperature)


@triton.jit
def _mass(line, vocab, most, temperature, least, BLOCK: tl.constexpr):
    """(how many weights reach `least`, their sum)."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        i = start + lane
        weight = _weights(line, i, vocab, most, temperature)
        kept = (weight >= least) & (i < vocab)
        count += kept.to(tl.int32)
        total += tl.where(kept, weight, 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(total, 0)


@triton.jit
def _threshold(line, vocab, most, temperature, top_k, top_p, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """The least weight that top-k and then top-p keep; top-p is a share of what top-k leaves.

    Both halve a range of weights until nothing is left to tell apart in it, mostly long before it is one float wide.
    """
    least = top_p * 0.0
    count, total = _mass(line, vocab, most, temperature, least, BLOCK)
    low = count * 0
    if top_k > 0:
        high = low + (ONE + 1)
        while (high - low > 1) & (count > top_k):
            middle = (low + high) // 2
            more, mass = _mass(line, vocab, most, temperature, middle.to(tl.float32, bitcast=True), BLOCK)
            enough = more >= top_k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
            count, total = tl.where(enough, more, count), tl.where(enough, mass, total)
        least = low.to(tl.float32, bitcast=True)
    if top_p < 1.0:
        spare = tl.where(top_k > 0, count - top_k, 0)  # of the least weight, only as many as top-k takes
        wanted = top_p.to(tl.float64) * (total - spare.to(tl.float64) * least.to(tl.float64))
        high = count * 0 + (ONE + 1)
        above = count * 0
        while (high - low > 1) & (count - above > 1):
            middle = (low + high) // 2
            more, mass = _mass(line, vocab, most, temperature, middle.to(tl.float32, bitcast=True), BLOCK)
            enough = mass >= wanted
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
            count, above = tl.where(enough, more, count), tl.where(enough, above, more)
        least = tl.maximum(least, low.to(tl.float32, bitcast=True))
    return least


@triton.jit
def _find(line, vocab, most, temperature, least, target, BLOCK: tl.constexpr):
    """The first token at which the cumulated weights exceed the target; the last kept one where none does."""
    lane = tl.arange(0, BLOCK)
    before = target * 0.0
    found = vocab
    last = vocab * 0
    for start in range(0, vocab, BLOCK):
        if found == vocab:
            i = start + lane
            weight = _weights(line, i, vocab, most, temperature)
            kept = (weight >= least) & (i < vocab)
            cumulated = before + tl.cumsum(tl.where(kept, weight, 0.0).to(tl.float64), 0)
            found = tl.min(tl.where(cumulated > target, i, vocab), 0)
            found = tl.minimum(found, vocab)
            before = tl.max(cumulated, 0)
            last = tl.maximum(last, tl.max(tl.where(kept, i, 0), 0))
    return tl.where(found < vocab, found, last)


@triton.jit
def _sample(
    tokens, last_token, tally, logits, forced, step, samples, vocab, logits_stride, tally_stride,
    SAMPLES: tl.constexpr, INTS: tl.constexpr, STATE: tl.constexpr, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, NOISE_HIGH: tl.constexpr, NOISE_LOW: tl.constexpr,
    PENALIZED: tl.constexpr, BITS: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of logits."""
    sample = tl.program_id(0)
    if sample < tl.load(step + SAMPLES):
        info = samples + sample * INTS
        line = logits + tl.cast(sample, tl.int64) * logits_stride
        lane = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        where = lane
        for start in range(0, vocab, BLOCK):
            i = start + lane
            value = tl.load(line + i, mask=i < vocab, other=float("-inf"))
            better = value > best
            best = tl.where(better, value, best)
            where = tl.where(better, i, where)
        most = tl.max(best, 0)
        token = tl.min(tl.where(best == most, where, vocab - 1), 0)
        temperature = tl.load(info + TEMPERATURE).to(tl.float32, bitcast=True)
        if temperature > 0.0:
            top_k = tl.load(info + TOP_K)
            top_p = tl.load(info + TOP_P).to(tl.float32, bitcast=True)
            least = tl.load(info + MIN_P).to(tl.float32, bitcast=True)
            if (top_k > 0) | (top_p < 1.0):
                least = tl.maximum(
                    least, _threshold(line, vocab, most, temperature, tl.minimum(top_k, vocab), top_p, BLOCK, ONE)
                )
            _, total = _mass(line, vocab, most, temperature, least, BLOCK)
            high = tl.load(info + NOISE_HIGH).to(tl.float64)
            low = tl.load(info + NOISE_LOW).to(tl.float64)
            noise = (high + low / (1 << BITS)) / (1 << BITS)
            token = _find(line, vocab, most, temperature, least, noise * total, BLOCK)
        wanted = tl.load(forced + sample)
        token = tl.where(wanted >= 0, wanted, token)
        state = tl.load(info + STATE).to(tl.int64)
        tl.store(tokens + sample, token)
        tl.store(last_token + state, token.to(tl.int64))
        if tl.load(info + PENALIZED) > 0:
            at = tally + state * tally_stride + token
            tl.store(at, tl.load(at) + 2)


def sample(
    tokens: Tensor, last_token: Tensor, tally: Tensor, logits: Tensor, forced: Tensor, step: Tensor, samples: Tensor
) -> None:
    """tokens: [samples] int32; last_token: [state rows] int64; logits: [samples, vocab] float32; tally: as above.

    forced: [samples] int32, a token that is taken whatever the logits say, -1: none.

    Semantics, for each sample s below step[SAMPLES]: t = the first of the largest logits where the temperature is 0,
    else draw(logits[s], ...) at the noise (NOISE_HIGH + NOISE_LOW / 2^24) / 2^24; tokens[s] = last_token[STATE] = t;
    tally[STATE, t] += 2 where PENALIZED is set.
    """
    rows, vocab = logits.shape
    meta = step_meta
    _sample[(rows,)](
        tokens, last_token, tally, logits, forced, step, samples, vocab, logits.stride(0), tally.stride(0),
        SAMPLES=meta.SAMPLES, INTS=meta.SAMPLE_INTS, STATE=meta.STATE, TEMPERATURE=meta.TEMPERATURE, TOP_K=meta.TOP_K,
        TOP_P=meta.TOP_P, MIN_P=meta.MIN_P, NOISE_HIGH=meta.NOISE_HIGH, NOISE_LOW=meta.NOISE_LOW,
        PENALIZED=meta.PENALIZED, BITS=meta.NOISE_BITS, ONE=ONE, BLOCK=SAMPLE_BLOCK, num_warps=8,
    )  # fmt: skip

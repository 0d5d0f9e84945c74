"""What a step tells the kernels at its ends: tokens in, samples out. Positions in the packed array; imports no triton.

The packed array ends in a tail of varying length: updates of the block tables, then edits of the logits.
"""

from collections.abc import Sequence

import numpy as np

from kernels.lora_meta import Ints

# Positions in the field `step`.
TABLE_UPDATES, EDITS, EDITS_AT, SAMPLES = range(4)
STEP_INTS = 4
UPDATE_INTS = 2  # place in the flat block tables, chunk
EDIT_INTS = 4  # sample, token, bits of what is added to the logit, 0

# Positions in a line of the field `samples`; floats are stored by their bits.
ROW, STATE, TEMPERATURE, TOP_K, TOP_P, MIN_P, NOISE_HIGH, NOISE_LOW, REPETITION, FREQUENCY, PRESENCE, PENALIZED = range(
    12
)
SAMPLE_INTS = 12
NOISE_BITS = 24  # of each half of the noise


def step_fields(tokens: int, samples: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The ends' part of a PackedLayout.

    ids: a token, or -1 - r for what the step before sampled into state row r; locations: chunk * block_tokens + offset
    in the block, -1: not stored.
    """
    return (
        ("step", (STEP_INTS,)),
        ("ids", (tokens,)),
        ("positions", (tokens,)),
        ("locations", (tokens,)),
        ("samples", (samples, SAMPLE_INTS)),
    )


def bits(values: Sequence[float]) -> Ints:
    """Float32 values as int32."""
    return np.array(values, np.float32).view(np.int32)

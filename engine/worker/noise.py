"""Counter-based noise: a uniform number from (seed, choice, output index) alone, the same on every device."""

_MASK = (1 << 64) - 1
_BITS = 48  # few enough that u times a float64 total stays below the total


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) for the `index`-th output token of a choice."""
    mixed = _mix(_mix(_mix(seed & _MASK) + choice) + index)  # one after the other, so that they cannot change places
    return float(mixed >> (64 - _BITS)) / float(1 << _BITS)


def _mix(value: int) -> int:
    """SplitMix64's step: every bit of the input moves about half of the output's."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

"""How sure a share is."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927): right also for few rows, and near 0 and 1."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    square = _Z * _Z / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by its standard error; the mean itself when there is but one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, mean
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _Z * math.sqrt(variance / len(values))
    return mean - half, mean + half

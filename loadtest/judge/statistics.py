"""Percentiles and intervals that do not flatter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95


def percentile(values: Floats | Sequence[float], q: float) -> float:
    """Nearest rank: the smallest value that at least a share `q` does not exceed; inf counts, nan when there is none.

    Interpolation would make nan of a failed request beside a good one.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    if not len(ordered):
        return math.nan
    return float(ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)])


def weighted_percentile(values: Floats, weights: npt.NDArray[np.int32], q: float) -> float:
    """Nearest rank where each value counts `weights` times."""
    if not len(values):
        return math.nan
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, math.ceil(q * reached[-1] - 1e-9))])


def at_most(count: int, trials: int, probability: float) -> float:
    """P(X <= count) for a binomial X."""
    if count < 0:
        return 0.0
    if count >= trials or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    steps = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(count + 1)
    )
    return min(1.0, math.fsum(math.exp(step) for step in steps))


def surely_at_most(misses: int, trials: int, share: float) -> bool:
    """Whether `misses` of `trials` prove, at 95 %, that the true share of misses is at most `share`.

    MLPerf LoadGen's early stopping is this test: p99 needs 299 samples without a miss, 473 with one.
    """
    return trials > 0 and at_most(misses, trials, share) <= 1 - CONFIDENCE


def surely_above(misses: int, trials: int, share: float) -> bool:
    """Whether `misses` of `trials` prove, at 95 %, that the true share of misses is above `share`."""
    return misses > 0 and 1 - at_most(misses - 1, trials, share) <= 1 - CONFIDENCE


def needed(misses: int, share: float) -> int:
    """The least number of trials with which `misses` still prove a share of at most `share`."""
    if share <= 0:
        return 0
    low, high = misses + 1, max(64, 4 * int((misses + 3) / share))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if surely_at_most(misses, middle, share) else (middle + 1, high)
    return low


def rising(at: Floats, values: Floats, least: float) -> bool:
    """Whether values climb: a least-squares slope more than four standard errors up, and by `least` over the whole span.

    Neighbouring samples of a queue depend on each other, so they are averaged into twelve stretches first.
    """
    if len(at) < 24:
        return False
    stretches = np.array_split(np.arange(len(at)), 12)
    x = np.array([at[part].mean() for part in stretches])
    y = np.array([values[part].mean() for part in stretches])
    x -= x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    residual = y - y.mean() - slope * x
    error = math.sqrt(float((residual**2).sum()) / (len(x) - 2) / float((x * x).sum()))
    return bool(slope * (at[-1] - at[0]) >= least and slope > 4 * error)

"""Two targets on the same tapes: ratios of what was measured, with intervals that respect the pairs.

A run is a pair of rounds, one for each target, of one tape; every request has its twin. The interval is a bootstrap's in two
steps: rounds are drawn with replacement, and within a round blocks of neighbouring requests, the same ones on both sides, for
requests that share a queue are no independent samples (H. R. Künsch, 1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from loadtest.drive.records import Record, Status
from loadtest.judge.measures import e2e, tpot, ttft
from loadtest.judge.statistics import percentile

Floats = npt.NDArray[np.float64]
Pair = tuple[Floats, Floats]
Value = Callable[[Record, float, float], float]
"""Of one request, given the window on the clock; inf for a failure, nan where it has none."""
Statistic = Callable[[Floats], Floats]
"""Of each row of a matrix, in which nan stands for no value."""
_DRAWS = 500
LEAST_ROUNDS = 3
"""Fewer pairs of rounds than this say nothing about the difference between rounds."""


class Difference(StrEnum):
    """What a ratio says about B, with A as the baseline."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    OPEN = "open"


@dataclass(frozen=True)
class Ratio:
    """A measure of both targets and B's over A's, with a 95 % interval; nan where it is not defined."""

    case: str
    measure: str
    unit: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    verdict: Difference


@dataclass(frozen=True)
class Round:
    """One tape sent to both: records, and each one's start on the clock (time.monotonic)."""

    a: Sequence[Record]
    b: Sequence[Record]
    starts: tuple[float, float]


@dataclass(frozen=True)
class _Measure:
    name: str
    unit: str
    value: Value
    of: Statistic
    more_is_better: bool = False


def ratios(case: str, rounds: Sequence[Round], window: tuple[float, float], tolerance: float) -> Iterator[Ratio]:
    """The ratios of one case. `window`: the measured seconds after the start; `tolerance`: a share that matters to nobody."""
    seconds = window[1] - window[0]
    for measure in _measures(seconds):
        pairs = _pairs(measure.value, rounds, window)
        if not pairs:
            continue
        a, b = (float(measure.of(side)[0]) for side in _sides(pairs))
        if measure.unit == "1/s":  # a sum over all rounds, which last as long together
            a, b = a / len(pairs), b / len(pairs)
        low, high = bootstrap(pairs, measure.of)
        verdict = _verdict(low, high, tolerance, len(pairs), more_is_better=measure.more_is_better)
        ratio = _ratio(pairs, measure.of)
        yield Ratio(case, measure.name, measure.unit, a, b, ratio, low, high, verdict)


def bootstrap(pairs: Sequence[Pair], of: Statistic, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the statistic's ratio B/A. Sides of different length (closed loops) are drawn apart."""
    rng = np.random.default_rng(seed)
    drawn: tuple[list[Floats], list[Floats]] = [], []
    for _ in pairs:
        chosen = rng.integers(0, len(pairs), _DRAWS)
        sides = [np.full((_DRAWS, max(len(pair[side]) for pair in pairs)), np.nan) for side in (0, 1)]
        for number, pair in enumerate(pairs):
            rows = np.flatnonzero(chosen == number)
            for filled, values in zip(sides, _redraw(pair, len(rows), rng), strict=True):
                filled[rows, : values.shape[1]] = values
        for side, filled in zip(drawn, sides, strict=True):
            side.append(filled)
    found = _over(*(of(np.concatenate(side, axis=1)) for side in drawn))
    found = found[~np.isnan(found)]
    return percentile(found, 0.025), percentile(found, 0.975)


def ttft_ratios(
    rounds: Sequence[Round], window: tuple[float, float], at: Sequence[float]
) -> list[tuple[float, float, float]]:
    """B's TTFT over A's at each of these percentiles, with its interval."""
    pairs = _pairs(_at_any_time(ttft), rounds, window)
    return [(_ratio(pairs, quantile(q)), *bootstrap(pairs, quantile(q))) for q in at] if pairs else []


def quantile(q: float) -> Statistic:
    """The nearest-rank percentile of each row; nan is no value, inf is one."""

    def of(values: Floats) -> Floats:
        ordered = np.sort(values, axis=1)  # nan comes last
        counts = (~np.isnan(values)).sum(axis=1)
        ranks = np.maximum(np.ceil(q * counts - 1e-9).astype(int) - 1, 0)
        return np.asarray(ordered[np.arange(len(ordered)), ranks])

    return of


def _redraw(pair: Pair, draws: int, rng: np.random.Generator) -> Pair:
    rows = _blocks(len(pair[0]), draws, rng)
    return pair[0][rows], pair[1][rows if len(pair[1]) == len(pair[0]) else _blocks(len(pair[1]), draws, rng)]


def _blocks(count: int, draws: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """For each draw the indices of blocks of about sqrt(n) neighbours, `count` in all; blocks run on round the end."""
    length = max(1, round(math.sqrt(count)))
    begins = rng.integers(0, count, (draws, math.ceil(count / length)))
    return np.asarray(((begins[:, :, None] + np.arange(length)).reshape(draws, -1) % count)[:, :count], np.int64)


def _pairs(value: Value, rounds: Sequence[Round], window: tuple[float, float]) -> list[Pair]:
    found = [_columns(value, one, window) for one in rounds]
    return [pair for pair in found if len(pair[0]) and len(pair[1])]


def _columns(value: Value, one: Round, window: tuple[float, float]) -> Pair:
    a, b = (
        np.array([value(record, start + window[0], start + window[1]) for record in _measured(records, start, window)])
        for records, start in zip((one.a, one.b), one.starts, strict=True)
    )
    return a, b


def _measured(records: Sequence[Record], start: float, window: tuple[float, float]) -> list[Record]:
    low, high = start + window[0], start + window[1]
    within = [one for one in records if low <= one.scheduled < high and one.status is not Status.CANCELLED]
    return sorted(within, key=lambda one: one.row)


def _measures(seconds: float) -> list[_Measure]:
    def rate(values: Floats) -> Floats:
        return np.asarray(np.nansum(values, axis=1) / seconds)

    return [
        _Measure("TTFT p50", "s", _at_any_time(ttft), quantile(0.5)),
        _Measure("TTFT p95", "s", _at_any_time(ttft), quantile(0.95)),
        _Measure("TPOT p50", "s", _at_any_time(tpot), quantile(0.5)),
        _Measure("E2E p95", "s", _at_any_time(e2e), quantile(0.95)),
        _Measure("tokens/s", "1/s", _tokens, rate, more_is_better=True),
    ]


def _at_any_time(value: Callable[[Record], float]) -> Value:
    """A measure that needs no window."""
    return lambda one, *_: value(one)


def _tokens(one: Record, low: float, high: float) -> float:
    """Tokens that came within the window; what the drain brings later was not served at this rate."""
    return float(sum(count for at, count in zip(one.times, one.counts, strict=True) if low <= at < high))


def _sides(pairs: Sequence[Pair]) -> tuple[Floats, Floats]:
    """All values of each side, as one row."""
    a, b = (np.concatenate([pair[side] for pair in pairs])[None, :] for side in (0, 1))
    return a, b


def _ratio(pairs: Sequence[Pair], of: Statistic) -> float:
    return float(_over(*(of(side) for side in _sides(pairs)))[0])


def _over(a: Floats, b: Floats) -> Floats:
    """b/a; nan where both are infinite or both zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(b / a)


def _verdict(low: float, high: float, tolerance: float, rounds: int, *, more_is_better: bool) -> Difference:
    if rounds < LEAST_ROUNDS or math.isnan(low):
        return Difference.OPEN
    if low > 1 + tolerance or high < 1 - tolerance:
        return Difference.BETTER if (low > 1) == more_is_better else Difference.WORSE
    return Difference.SAME if 1 - tolerance <= low and high <= 1 + tolerance else Difference.OPEN

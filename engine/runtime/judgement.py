"""Whether a canary does as well as the version that it is to replace. Pure statistics; runtime and clock are elsewhere.

It is looked at every second, and what is looked at often enough shows a false alarm sooner or later. So both tests are
one-sided at 0.1 %, and early ends need that much; to be promoted takes more: enough requests, and no bound passed even by a
little.

- Errors: the lower bound of Wilson's interval ('Probable inference, the law of succession, and statistical inference', 1927)
  for the canary's error rate lies above its limit and above the current version's own rate.
- TTFT: Mann and Whitney's test ('On a test of whether one of two random variables is stochastically larger than the other',
  1947) of the canary's times against the current version's times the ratio. It is about typical requests, not about tails.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

from engine.intervals import wilson
from engine.registry.manifest import Trial
from engine.runtime.recent import Recent

Z = 3.09  # one-sided, 0.1 %
LEAST = 10  # requests of the canary before its errors are judged
LEAST_TIMES = 20  # of each side, before times are
ENOUGH = 50  # requests of each side, to be promoted


@dataclass
class Tally:
    """What is known about one side; `ttft` is in seconds, waits for a place or a load left out."""

    requests: int = 0
    failed: int = 0
    ttft: Recent = field(default_factory=Recent)

    @property
    def error_rate(self) -> float:
        """Share of failed requests; 0 without any."""
        return self.failed / self.requests if self.requests else 0.0

    def add(self, *, failed: bool, ttft_s: float = 0.0) -> None:
        """One more request; `ttft_s` is 0 if no token came."""
        self.requests += 1
        self.failed += failed
        if ttft_s > 0:
            self.ttft.add(ttft_s)


def breach(trial: Trial, canary: Tally, current: Tally) -> str | None:
    """Why the canary has to end now, with the numbers; None if it need not."""
    bound = max(trial.max_error_rate, current.error_rate)
    if canary.requests >= LEAST and wilson(canary.failed, canary.requests, Z)[0] > bound:
        return f"{_errors(canary, current)}, above {trial.max_error_rate:.4g}"
    times = canary.ttft, current.ttft
    if min(map(len, times)) >= LEAST_TIMES and larger(*times, trial.max_ttft_ratio) > Z:
        return f"{_times(canary, current)}, above {trial.max_ttft_ratio:.4g} times"
    return None


def shortfall(trial: Trial, canary: Tally, current: Tally) -> str | None:
    """Why the canary may not be promoted, though nothing made it end early; None if it may."""
    if min(canary.requests, current.requests) < ENOUGH:
        return f"too few requests to tell: {canary.requests} and {current.requests} of current, {ENOUGH} needed of each"
    if canary.error_rate > max(trial.max_error_rate, current.error_rate):
        return f"{_errors(canary, current)}, above {trial.max_error_rate:.4g}"
    ours, theirs = canary.ttft.percentile(50), current.ttft.percentile(50)
    if ours is None or theirs is None or ours > trial.max_ttft_ratio * theirs:
        return f"{_times(canary, current)}, above {trial.max_ttft_ratio:.4g} times"
    return None


def numbers(canary: Tally, current: Tally) -> str:
    """Both sides in a few words."""
    return f"{_errors(canary, current)}; {_times(canary, current)}"


def larger(ours: Recent, theirs: Recent, ratio: float) -> float:
    """How many standard deviations Mann and Whitney's U of `ours` lies above what equal ones would give, `theirs` scaled."""
    scaled = sorted(ratio * value for value in theirs.values)
    n, m = len(ours), len(scaled)
    wins = sum(bisect.bisect_left(scaled, value) + bisect.bisect_right(scaled, value) for value in ours.values) / 2
    return (wins - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def _errors(canary: Tally, current: Tally) -> str:
    return f"{canary.failed} of {canary.requests} failed (current: {current.failed} of {current.requests})"


def _times(canary: Tally, current: Tally) -> str:
    ours, theirs = canary.ttft.percentile(50), current.ttft.percentile(50)
    if ours is None or theirs is None:
        return "median TTFT unknown"
    return f"median TTFT {ours * 1000:.1f} ms (current: {theirs * 1000:.1f} ms)"

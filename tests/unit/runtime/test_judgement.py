"""The statistics by which canaries are judged: sure of what is bad, patient with chance, strict about promotion."""

from __future__ import annotations

import random

import pytest

from engine.intervals import wilson
from engine.registry.manifest import Trial
from engine.runtime.judgement import ENOUGH, LEAST, Tally, Z, breach, larger, shortfall
from engine.runtime.recent import Recent

TRIAL = Trial(seconds=600, max_error_rate=0.02, max_ttft_ratio=1.5)


def tally(requests: int, failed: int = 0, ttft_s: float = 0.1, spread: float = 0.2, seed: int = 1) -> Tally:
    """A side with so many requests; those that did not fail have times around `ttft_s`."""
    rng = random.Random(seed)
    made = Tally()
    for number in range(requests):
        bad = number < failed
        made.add(failed=bad, ttft_s=0.0 if bad else ttft_s * rng.lognormvariate(0, spread))
    return made


def test_wilson_is_as_published() -> None:
    """The bound for 10 of 100 at 95 % (two-sided) is the textbook's 0.0552; none of any number is 0."""
    assert wilson(10, 100, 1.96)[0] == pytest.approx(0.0552, abs=5e-4)
    assert wilson(0, 50, Z)[0] == 0.0
    assert 0 < wilson(1, 10, Z)[0] < 0.1


def test_u_is_as_published() -> None:
    """Equal sides give 0, ties included; sides that do not overlap give the most that there is, up or down."""
    low, high = Recent(), Recent()
    for value in range(10):
        low.add(value)
        high.add(value + 100)
    assert larger(low, low, 1.0) == 0
    assert larger(high, low, 1.0) == pytest.approx(50 / (10 * 10 * 21 / 12) ** 0.5)
    assert larger(low, high, 1.0) == -larger(high, low, 1.0)


@pytest.mark.parametrize(
    ("canary", "current", "why"),
    [
        (tally(LEAST, failed=LEAST), tally(100), "10 of 10 failed"),
        (tally(200, failed=30), tally(1000, failed=2), "30 of 200 failed"),
        (tally(100, ttft_s=0.3), tally(100, ttft_s=0.1), "median TTFT"),
        (tally(LEAST - 1, failed=LEAST - 1), tally(100), None),  # too few to say
        (tally(200, failed=5), tally(200, failed=2), None),  # 2.5 % may be chance
        (tally(100, failed=50), tally(100, failed=60), None),  # the server fails, not the canary
        (tally(100, ttft_s=0.14), tally(100, ttft_s=0.1), None),  # slower, but within the ratio
        (tally(19, ttft_s=9.0), tally(100, ttft_s=0.1), None),  # too few times
    ],
)
def test_breach(canary: Tally, current: Tally, why: str | None) -> None:
    """What is worse beyond chance ends, with its numbers; what may be chance, or is everybody's trouble, does not."""
    found = breach(TRIAL, canary, current)
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


@pytest.mark.parametrize(
    ("canary", "current", "why"),
    [
        (tally(ENOUGH), tally(ENOUGH, seed=2), None),
        (tally(ENOUGH - 1), tally(1000), "too few requests"),
        (tally(1000), tally(ENOUGH - 1), "too few requests"),
        (tally(100, failed=3), tally(100), "3 of 100 failed"),  # no breach, but above its limit
        (tally(100, ttft_s=0.16), tally(100), "median TTFT"),
    ],
)
def test_promotion_takes_more(canary: Tally, current: Tally, why: str | None) -> None:
    """Enough requests on both sides, and no bound passed even by a little."""
    found = shortfall(TRIAL, canary, current)
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


def test_looking_often_raises_few_false_alarms() -> None:
    """A canary as good as current, both failing as much as is allowed, looked at after every request: at most 6 % end."""
    rng = random.Random(7)
    alarms = 0
    for _ in range(150):
        canary, current = Tally(), Tally()
        for _ in range(300):
            current.add(failed=rng.random() < 0.02)
            canary.add(failed=rng.random() < 0.02)
            if breach(TRIAL, canary, current):
                alarms += 1
                break
    assert alarms <= 9


def test_slow_canaries_are_found_and_equal_ones_are_not() -> None:
    """Of equal sides none of 60 is called slow; of sides at twice the ratio all are, within 40 requests."""
    for seed in range(60):
        current = tally(400, spread=0.5, seed=seed)
        assert breach(TRIAL, tally(40, ttft_s=0.1, spread=0.5, seed=1000 + seed), current) is None
        assert breach(TRIAL, tally(40, ttft_s=0.3, spread=0.5, seed=2000 + seed), current)

"""What the endurance benchmark makes of what it saw."""

from __future__ import annotations

import pytest

from loadtest.bench.endurance.load import Outcome, goodput
from loadtest.bench.endurance.overload import recovery_s, refusals
from loadtest.bench.endurance.vitals import Vitals, slope_mib_per_h


def answered(sent: float, first_s: float = 0.1) -> Outcome:
    """A good answer."""
    return Outcome(sent, sent + 1, "OK", first_s, 8)


def test_only_good_answers_count() -> None:
    """Refused, late and broken ones are no goodput."""
    seen = [answered(0), answered(1), Outcome(0, 1, "UNAVAILABLE"), Outcome(0, 10, "DEADLINE_EXCEEDED", 9.0, 3)]
    assert goodput(seen, 2) == 1.0


def test_a_refusal_without_a_hint_is_counted() -> None:
    """A refusal has to say when to come again; a deadline is the caller's own."""
    seen = [
        Outcome(0, 0.5, "UNAVAILABLE", hint=True),
        Outcome(0, 0.2, "RESOURCE_EXHAUSTED"),
        Outcome(0, 9.0, "DEADLINE_EXCEEDED"),
    ]
    told = refusals(seen)
    assert told["without_hint"] == 1
    assert told["refused_within_s"] == 0.5
    assert told["codes"] == {"UNAVAILABLE": 1, "RESOURCE_EXHAUSTED": 1, "DEADLINE_EXCEEDED": 1}


def test_recovery_is_when_it_stays_normal() -> None:
    """A good moment between two bad ones does not count; a refusal is not normal."""
    slow = [answered(at / 4, 5.0) for at in range(8)]
    good = [answered(2 + at / 4) for at in range(8)]
    refused = [Outcome(4.5, 4.6, "UNAVAILABLE", hint=True)]
    rest = [answered(6 + at / 4) for at in range(16)]
    assert recovery_s([*slow, *good, *refused, *rest], over=0.0, limit_s=0.2) == 6.0
    assert recovery_s(good, over=2.0, limit_s=0.2) == 0.0
    assert recovery_s(slow, over=0.0, limit_s=0.2) is None


def test_growth_is_what_caches_do_not_explain() -> None:
    """Memory that fills at first and then stays does not grow; a leak of 1 MiB a minute is 60 an hour."""
    filling = [Vitals(at, 1000 + min(at, 20) * 10, 50) for at in range(100)]
    assert slope_mib_per_h(filling) == pytest.approx(0, abs=1e-6)
    leaking = [Vitals(at, 1000 + at / 60, 50) for at in range(100)]
    assert slope_mib_per_h(leaking) == pytest.approx(60)

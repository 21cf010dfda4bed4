"""The highest rate that meets the requirements: doubling, then bisection, then the edge again and again.

Only a probe that MEETS moves the lower bound. One that does not, or cannot be resolved with more samples, moves the upper one:
what is found has been shown to hold, not merely not refuted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from loadtest.drive.case import Result
from loadtest.judge.verdict import Verdict, overall
from loadtest.plan.requirements import Requirements

_DOUBLINGS = 12
_LEAST = 64  # how often the first rate is halved before none is believed to meet


class Ended(StrEnum):
    """Why a search ended."""

    FOUND = "found"
    NONE = "no rate meets the requirements"
    BUDGET = "the budget is spent"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Probe:
    """One run at one rate, and what it says of this rate."""

    rate: float
    verdict: Verdict
    reason: str = ""
    result: Result | None = None
    final: bool = False
    """A wrong answer, a dead target or an interruption: no further probe makes sense."""
    hopeless: bool = False
    """Inconclusive for a reason that more samples do not help."""


@dataclass
class Found:
    """What a search came to; rates are requests/s, or callers where the arrival is a closed loop."""

    probes: list[Probe] = field(default_factory=list)
    best: float = 0.0
    """The highest rate that was shown to meet; 0 for none."""
    above: float = 0.0
    """The lowest rate that was not; 0 for none."""
    confirmed: int = 0
    """Runs at `best` that met, all of them if it was found."""
    ended: Ended = Ended.BUDGET


Run = Callable[[float, int], Awaitable[Probe | None]]
"""Probe a rate for the n-th time (0, 1, ...; later ones with other seeds, and longer); None when the budget is spent."""


async def find(run: Run, start: float, tolerance: float, *, whole: bool = False, times: int = 3) -> Found:
    """Search from `start` until the bounds are within `tolerance` of each other and the best has met `times` times."""
    found = Found()
    rate = start
    while True:
        probe = await _resolve(run, found, rate)
        if probe is None or probe.final:
            found.ended = Ended.STOPPED if probe else Ended.BUDGET
            return found
        _move(found, probe)
        if _narrow(found, tolerance, whole):
            if not await _confirm(run, found, times):
                return found
            if found.confirmed >= times:
                found.ended = Ended.FOUND
                return found
        elif not found.best and found.above <= start / _LEAST:
            found.ended = Ended.NONE
            return found
        rate = _next(found, start, whole)
        if rate == 0:
            found.ended = Ended.NONE
            return found


async def _resolve(run: Run, found: Found, rate: float) -> Probe | None:
    """Probe a rate, once more where samples were too few."""
    seen = sum(one.rate == rate for one in found.probes)
    probe: Probe | None = None
    for turn in range(2):
        probe = await run(rate, seen + turn)
        if probe is None:
            return None
        found.probes.append(probe)
        if probe.verdict is not Verdict.INCONCLUSIVE or probe.final or probe.hopeless:
            break
    return probe


def _move(found: Found, probe: Probe) -> None:
    if probe.verdict is Verdict.MEETS:
        found.best, found.confirmed = probe.rate, 1
    else:
        found.above = min(found.above or probe.rate, probe.rate)


async def _confirm(run: Run, found: Found, times: int) -> bool:
    """Probe the best rate again; where it does not meet this time, fall back. False: there can be no further probe."""
    while found.confirmed < times:
        probe = await _resolve(run, found, found.best)
        if probe is None or probe.final:
            found.ended = Ended.STOPPED if probe else Ended.BUDGET
            return False
        if probe.verdict is Verdict.MEETS:
            found.confirmed += 1
            continue
        found.above = found.best
        lower = [one.rate for one in found.probes if one.verdict is Verdict.MEETS and one.rate < found.above]
        found.best, found.confirmed = max(lower, default=0.0), 1 if lower else 0
        return True
    return True


def _narrow(found: Found, tolerance: float, whole: bool) -> bool:
    if not (found.best and found.above):
        return False
    return found.above <= found.best * (1 + tolerance) or (whole and found.above - found.best <= 1)


def _next(found: Found, start: float, whole: bool) -> float:
    """The next rate to probe; 0 when there is none."""
    if not found.above:
        rate = found.best * 2 if found.best < start * 2**_DOUBLINGS else 0.0
    elif not found.best:
        rate = found.above / 2
    else:
        rate = (found.best + found.above) / 2
    return float(int(rate)) if whole else float(f"{rate:.4g}")


def judge(rate: float, result: Result) -> Probe:
    """What a run says of its rate. A queue that kept growing does not meet, whatever its percentiles were until then."""
    if result.interrupted or result.gone or result.correctness.wrong:
        return Probe(rate, Verdict.INCONCLUSIVE, result.gone or "wrong answers or interrupted", result, final=True)
    if result.health.problems or result.health.late:
        reason = (result.health.problems + result.health.late)[0]
        return Probe(rate, Verdict.INCONCLUSIVE, f"the client: {reason}", result, hopeless=True)
    verdict = overall(result.checks)
    if result.growing and verdict is not Verdict.FAILS:
        return Probe(rate, Verdict.FAILS, "requests under way kept growing", result)
    blamed = [f"{one.name}: {one.note or 'missed'}" for one in result.checks if one.verdict is verdict]
    return Probe(rate, verdict, "" if verdict is Verdict.MEETS else blamed[0], result)


def samples(required: Requirements, misses: int = 2) -> int:
    """Requests with which every percentile and share can be judged, even with a few misses."""
    from loadtest.judge.statistics import needed
    from loadtest.plan.requirements import LATENCIES, QUANTILES

    shares = [1 - QUANTILES[key] for name in LATENCIES if name != "itl" for key, _ in getattr(required, name).limits()]
    shares += [1 - QUANTILES[key] for key, _ in required.slowdown.limits()]
    shares += [1 - least for least in (required.attainment, required.worst_adapter) if least is not None]
    shares += [required.error_rate] if required.error_rate else []
    return max((needed(misses, share) for share in shares if share > 0), default=0)


def limiting(found: Found) -> str:
    """What grew most from the best rate to the one above it, of the parts that make up TTFT; empty if unknown."""

    def parts(rate: float) -> dict[str, float]:
        results = [one.result for one in found.probes if one.rate == rate and one.result]
        return dict(results[-1].measures["parts"]) if results else {}

    low, high = parts(found.best), parts(found.above)
    growth = {name: high[name] - low.get(name, 0.0) for name in high}
    most = max(growth, key=lambda name: growth[name], default="")
    return most if most and growth[most] > 0 else ""

"""Whether the client drove the load that the tape asks for, and in time.

Another load than the tape's makes the whole run say something about the client only. Lateness makes times doubtful, and nothing
else: who answered, and whether all of it came, is as true of a request that went out late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from loadtest.drive.records import Beat, Record, Status
from loadtest.judge.statistics import percentile, rising
from loadtest.plan.requirements import Requirements

LAG_S = 0.005
LOOP_LAG_S = 0.010
_OF_LIMIT = 0.02
_CPU = 0.8
_RATE = 0.01


@dataclass(frozen=True)
class ClientHealth:
    """The client's own cost and punctuality: `problems` make the run INVALID, `late` leaves requirements on times open."""

    lag_p50_s: float
    lag_p99_s: float
    loop_lag_p99_s: float
    cpu: float
    """Cores that all client processes used together, on average."""
    busiest: float
    """Share of a core of the busiest process."""
    dropped: int
    sent: int
    due: int
    allowed_lag_s: float
    problems: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)


def tolerance(requirements: Requirements, alone_ttft_s: float, median_ttft_s: float, least: float) -> float:
    """How late the client may be: `least`, or 2 % of the TTFT limit (of the measured median where there is none).

    A limit on the slowdown is one on TTFT too: so many times what a request alone takes.
    """
    limits = [limit for _, limit in requirements.ttft.limits()]
    limits += [limit * alone_ttft_s for _, limit in requirements.slowdown.limits()]
    good = requirements.good
    limits += filter(None, (good.ttft, (good.slowdown or 0.0) * alone_ttft_s))
    limits = [limit for limit in limits if limit > 0]
    reference = min(limits) if limits else (median_ttft_s if math.isfinite(median_ttft_s) else 0.0)
    return max(least, _OF_LIMIT * reference)


def health(
    records: Sequence[Record],
    beats: Sequence[Beat],
    due: int,
    requirements: Requirements,
    alone_ttft_s: float,
    median_ttft_s: float,
) -> ClientHealth:
    """Judge the client. `due` is how many requests the tape had for the time that was run (closed loop: as many as were)."""
    lags = [one.sent - one.scheduled for one in records if one.sent]
    loop_lags = [lag for beat in beats for lag in beat.loop_lags]
    dropped = sum(one.status is Status.DROPPED for one in records)
    cpu = _cpu(beats)
    found = ClientHealth(
        lag_p50_s=_or_zero(percentile(lags, 0.5)),
        lag_p99_s=_or_zero(percentile(lags, 0.99)),
        loop_lag_p99_s=_or_zero(percentile(loop_lags, 0.99)),
        cpu=sum(cpu.values()),
        busiest=max(cpu.values(), default=0.0),
        dropped=dropped,
        sent=len(lags) - dropped,
        due=due,
        allowed_lag_s=tolerance(requirements, alone_ttft_s, median_ttft_s, LAG_S),
    )
    found.problems.extend(_problems(found))
    found.late.extend(_late(found, tolerance(requirements, alone_ttft_s, median_ttft_s, LOOP_LAG_S)))
    return found


def _late(found: ClientHealth, allowed_loop_lag_s: float) -> list[str]:
    late = []
    if found.lag_p99_s > found.allowed_lag_s:
        late.append(
            f"requests went out {found.lag_p99_s * 1000:.1f} ms late (p99; allowed {found.allowed_lag_s * 1000:.1f} ms): "
            "use more --workers, or a machine that the server does not share"
        )
    if found.loop_lag_p99_s > allowed_loop_lag_s:
        late.append(
            f"the client's event loops were {found.loop_lag_p99_s * 1000:.1f} ms late "
            f"(p99; allowed {allowed_loop_lag_s * 1000:.1f} ms): use more --workers"
        )
    if found.busiest > _CPU:
        late.append(f"a client process used {found.busiest:.0%} of its core: use more --workers")
    return late


def _problems(found: ClientHealth) -> list[str]:
    problems = []
    if found.dropped:
        problems.append(
            f"{found.dropped} requests were never sent: max_inflight was reached; raise it, or lower the rate"
        )
    if abs(found.sent - found.due) > max(1.0, _RATE * found.due) and not found.dropped:
        problems.append(f"{found.sent} requests were sent where the tape has {found.due}")
    return problems


def growing(records: Sequence[Record], start: float, warmup_s: float, end_s: float) -> bool:
    """Whether the number of requests under way kept rising: then the rate is above what the target can do."""
    moments = np.linspace(start + warmup_s, start + end_s, 120)
    begun = np.sort([one.scheduled for one in records])
    ended = np.sort([one.ended if one.ended else math.inf for one in records])
    under_way = np.searchsorted(begun, moments) - np.searchsorted(ended, moments)
    least = max(3.0, 0.5 * float(under_way.mean()))
    return rising(moments, under_way.astype(np.float64), least)


def _cpu(beats: Sequence[Beat]) -> dict[int, float]:
    used: dict[int, list[float]] = {}
    for beat in beats:
        if beat.cpu:
            used.setdefault(beat.worker, []).append(beat.cpu)
    return {worker: float(np.mean(values)) for worker, values in used.items()}


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value

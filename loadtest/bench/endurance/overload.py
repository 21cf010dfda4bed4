"""Five times more than it can do: whether goodput holds, whether every refusal is clear, and how soon it is over."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil

from engine.client import AsyncClient
from loadtest.bench import output
from loadtest.bench.endurance.load import Load, Outcome, goodput, ttft_p95
from loadtest.bench.endurance.vitals import cores, left_over, slope_mib_per_h, watched

TIMES = 5.0  # of what it can do
_NORMAL = 0.5  # of what it can do: the load before and after
_WITHIN = 1.5  # times the p95 of before: normal again
_STEP_S, _AFTER_S = 2.0, 20.0
_CALLERS = 64


async def overload(
    client: AsyncClient, load: Load, process: psutil.Process, seconds: float, warm_s: float, step: output.Step
) -> dict[str, Any]:
    """Find what the server can do in `warm_s`, ask for five times as much for `seconds`, then for half again."""
    with step(f"what it can do: {_CALLERS} callers for {warm_s:.0f} s"):
        await load.closed(_CALLERS, warm_s / 4)
        with cores(process) as at_peak:
            peak = goodput(await load.closed(_CALLERS, warm_s), warm_s)
    with step(f"half of it: {_NORMAL * peak:.1f} requests/s"):
        before = await load.at_rate(_NORMAL * peak, warm_s)
    async with watched(process) as vitals:
        with step(f"{TIMES:.0f} times as much as it can do for {seconds:.0f} s"):
            over = time.monotonic() + seconds
            with cores(process) as at_times:
                during = await load.at_rate(TIMES * peak, seconds)
        with step("half of it again"):
            normal = time.monotonic()
            after = await load.at_rate(_NORMAL * peak, _AFTER_S)
    return {
        "peak_per_s": peak,
        "offered_per_s": len(during) / seconds,
        # What the queue still held at the end was answered later, and would flatter a short run.
        "goodput_of_peak": goodput([one for one in during if one.ended <= over], seconds) / peak,
        # Callers, refusals and engine share this machine: what the first two take here, the engine does not have.
        "cores_at_peak": asdict(at_peak),
        "cores_during": asdict(at_times),
        **refusals(during),
        "memory_mib": (vitals[0].memory_mib, max(one.memory_mib for one in vitals)),
        "memory_mib_per_h": slope_mib_per_h(vitals),
        "ttft_p95_before_s": ttft_p95(before),
        "ttft_p95_during_s": ttft_p95(during),
        "recovery_s": recovery_s(after, normal, _WITHIN * ttft_p95(before)),
        "left": await left_over(client),
    }


def refusals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How they ended, and how many of those who were refused were not told when to come again."""
    refused = [outcome for outcome in outcomes if outcome.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")]
    return {
        "codes": dict(Counter(outcome.code for outcome in outcomes)),
        "without_hint": sum(not outcome.hint for outcome in refused),
        "refused_within_s": max((outcome.ended - outcome.sent for outcome in refused), default=0.0),
    }


def recovery_s(outcomes: Sequence[Outcome], over: float, limit_s: float) -> float | None:
    """Seconds from `over` until the p95 of every two seconds to come is within the limit; None if it never is."""
    last = max(outcome.sent for outcome in outcomes)
    found: float | None = None
    for start in itertools.takewhile(lambda at: at <= last, itertools.count(over, _STEP_S)):
        some = [outcome for outcome in outcomes if start <= outcome.sent < start + _STEP_S]
        fine = all(outcome.good for outcome in some) and ttft_p95(some) <= limit_s
        if not fine:
            found = None
        elif found is None:
            found = start - over
    return found

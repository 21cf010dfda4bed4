"""What a run would be, before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loadtest.judge.statistics import needed
from loadtest.plan import arrivals, lengths, popularity, tape
from loadtest.plan.requirements import LATENCIES, QUANTILES
from loadtest.plan.scenario import Case, chosen

_UNKNOWN = 8  # adapters to reckon with where the target would say how many it has


def forecast(names: list[str], quick: bool, overrides: Mapping[str, Any], capacity: float) -> Iterator[str]:
    """Lines about each case: duration, requests, tokens/s, hit rates, whether the samples suffice, the tape's digest."""
    total = 0.0
    for case in chosen(names, quick=quick, overrides=overrides):
        total += case.workload.duration
        yield from _case(case, capacity)
    yield f"in all {total:.0f} s of load, without starts, references and drains"


def _case(case: Case, capacity: float) -> Iterator[str]:
    work = case.workload
    work = work.model_copy(update={"arrival": arrivals.absolute(work.arrival, capacity)})
    names = (
        work.adapters
        if isinstance(work.adapters, tuple)
        else tuple(f"a{n}" for n in range(8 if work.adapters == "all" else work.adapters))
    )
    made = tape.build(work, names)
    yield f"[bold]{case.title}[/]  {case.workload.arrival}, {work.duration:g} s, {len(names)} adapters"
    if made.callers:
        yield f"  {made.callers} callers; how many requests they send depends on the target"
        return
    measured = int((made.at >= work.warmup).sum())
    rate = len(made) / work.duration
    tokens = rate * lengths.mean(work.output)
    yield f"  {len(made)} requests ({measured} measured), {rate:.3g}/s, {tokens:.0f} tokens/s, tape {made.sha256[:12]}"
    if names and not work.base_share >= 1:
        shares = popularity.shares(work.popularity, names)
        yield "  best hit rate with " + ", ".join(
            f"{slots} slots {popularity.best_hit_rate(shares, slots):.0%}" for slots in (4, 8, 16)
        )
    yield from _samples(work.requirements, measured)


def _samples(required: Any, measured: int) -> Iterator[str]:
    for name in LATENCIES:
        for key, _ in getattr(required, name).limits():
            least = needed(0, 1 - QUANTILES[key])
            if name != "itl" and measured < least:
                yield f"  [yellow]{name} {key} will be INCONCLUSIVE: {measured} samples, at least {least} are needed[/]"

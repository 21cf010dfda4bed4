"""The highest rate that meets the requirements, the curve to it, and how many replicas a wanted rate takes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from loadtest.commands.run import Options, end_on_sigterm, opened, references, shown, tell, wanted_cases
from loadtest.console import err
from loadtest.drive.case import resolved, with_arrival
from loadtest.drive.search import Ended, Found, Probe, find, judge, limiting, samples
from loadtest.drive.site import Site
from loadtest.errors import BadInput, Exit
from loadtest.judge.verdict import Verdict, replicas
from loadtest.plan import arrivals
from loadtest.plan.requirements import Requirements
from loadtest.plan.scenario import Case
from loadtest.report import curves, document
from loadtest.report.write import new_folder, write


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How a search is led: requests/s to begin with (0: the scenario's own), closeness, and seconds in all."""

    start: float
    tolerance: float
    budget_s: float
    times: int
    wanted: float


async def execute(options: Options, bounds: Bounds, folder: Path, *, as_json: bool) -> Exit:
    """Search, write the report, print the curve; returns the exit code."""
    case = _case(options)
    new_folder(folder)
    end_on_sigterm()
    async with opened(options, [case]) as site:
        await references(site, [case])
        case = await resolved(case, site)
        prober = _Prober(site, case, bounds.budget_s)
        arrival = arrivals.parse(case.workload.arrival)
        start = bounds.start or arrival.callers or arrival.rate
        found = await find(prober, start, bounds.tolerance, whole=arrival.callers > 0, times=bounds.times)
        return _report(found, site, bounds, folder, as_json=as_json)


def _case(options: Options) -> Case:
    found = wanted_cases(
        options.names, options.serve, options.adapters, quick=options.quick, overrides=options.overrides
    )
    if len(found) != 1:
        raise BadInput(
            f"{', '.join(options.names)} has {len(found)} cases, a search takes one",
            "Name one, such as steady or skew/uniform.",
        )
    (case,) = found
    required = case.workload.requirements
    if not samples(required) and not required.goodput:
        raise BadInput("nothing is required that a rate could miss", "Add --slo 'ttft.p95<500ms', or --require FILE.")
    try:
        arrivals.scaled(case.workload.arrival, 1.0)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return case


class _Prober:
    """Runs the case at a rate, for as long as its requirements need samples and the budget lasts."""

    def __init__(self, site: Site, case: Case, budget_s: float) -> None:
        self._site = site
        self._case = case
        self._until = time.monotonic() + budget_s

    async def __call__(self, rate: float, turn: int) -> Probe | None:
        work = self._case.workload
        measured = max(work.duration - work.warmup, self._needed(rate)) * (1 if turn == 0 else 1.5)
        if time.monotonic() + work.warmup + measured > self._until:
            return None
        case = with_arrival(self._case, arrivals.scaled(work.arrival, rate))
        changes = {"duration": work.warmup + measured, "seed": work.seed + turn}
        name = f"{rate:g}/s" + (f" #{turn + 1}" if turn else "")
        case = case.model_copy(update={"name": name, "workload": case.workload.model_copy(update=changes)})
        probe = judge(rate, await shown(self._site, case))
        err.print(Text(f"  {probe.verdict} {probe.reason}", "dim"))
        return probe

    def _needed(self, rate: float) -> float:
        """Seconds that bring enough samples; a closed loop's rate is not known beforehand."""
        work = self._case.workload
        return 0.0 if arrivals.parse(work.arrival).callers else samples(work.requirements) / rate


def _report(found: Found, site: Site, bounds: Bounds, folder: Path, *, as_json: bool) -> Exit:
    results = [probe.result for probe in found.probes if probe.result]
    required = results[0].case.workload.requirements if results else Requirements()
    wanted = bounds.wanted or required.rate or 0.0
    code, verdict = _judged(found)
    about = {
        "unit": "callers" if results and results[0].tape.callers else "requests/s",
        "best": found.best, "above": found.above, "confirmed": found.confirmed, "ended": str(found.ended),
        "limiting": limiting(found), "wanted": wanted,
        "replicas": replicas(wanted, found.best) if wanted and found.best else None,
        "probes": [_probe(probe) for probe in sorted(found.probes, key=lambda one: one.rate)],
    }  # fmt: skip
    data = document.document(
        results, site, ["loraplex", "loadtest", *sys.argv[1:]], "search",
        exit=int(code), verdict=verdict, search=document.clean(about),
    )  # fmt: skip
    write(results, data, folder, curves.searched(found, required))
    tell(data, folder, as_json=as_json)
    return code


def _probe(probe: Probe) -> dict[str, Any]:
    measures = probe.result.measures if probe.result else {}
    kept = ("requests", "ttft", "service_ttft", "tpot", "attainment", "goodput", "tokens_per_s")
    return {"rate": probe.rate, "verdict": probe.verdict, "reason": probe.reason} | {
        key: measures.get(key) for key in kept
    }


def _judged(found: Found) -> tuple[Exit, str]:
    results = [probe.result for probe in found.probes if probe.result]
    if found.ended is Ended.STOPPED:
        code = document.worst([one for one in results if one.interrupted or one.gone or one.correctness.wrong])
        return code, Verdict.FAILS if code is Exit.INCORRECT else Verdict.INCONCLUSIVE
    if found.ended is Ended.FOUND:
        return Exit.PASS, Verdict.MEETS
    return (Exit.MISSED, Verdict.FAILS) if found.ended is Ended.NONE else (Exit.UNRESOLVED, Verdict.INCONCLUSIVE)

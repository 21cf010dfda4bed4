"""One case from the tape to the verdict, against a target that has been looked at."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from loadtest.drive import actions
from loadtest.drive.crew import drive
from loadtest.drive.driver import Job
from loadtest.drive.proxy import proxied
from loadtest.drive.records import Beat, Record
from loadtest.drive.site import Site, asked_adapters
from loadtest.drive.targets import TargetSpec
from loadtest.errors import Exit, TargetGone
from loadtest.judge import canaries, correctness, measures, validity, verdict
from loadtest.judge.statistics import percentile
from loadtest.plan import arrivals
from loadtest.plan.scenario import NETWORK_ACTIONS, Case, Workload
from loadtest.plan.tape import Tape, build, noisy_adapter

_CALIBRATION_S = 8.0
OnBatch = Callable[[list[Record], Beat], None]


@dataclass
class Result:
    """Everything about one case that was run."""

    case: Case
    tape: Tape
    start: float
    records: list[Record]
    beats: list[Beat]
    events: list[actions.Event]
    measures: dict[str, Any]
    health: validity.ClientHealth
    correctness: correctness.Correctness
    checks: list[verdict.Check]
    growing: bool
    interrupted: bool
    gone: str = ""

    @property
    def exit(self) -> Exit:
        """The exit code of this case alone."""
        if self.interrupted:
            return Exit.INTERRUPTED
        if self.gone:
            return Exit.UNREACHABLE
        return verdict.exit_code(self.checks, self.health.problems, incorrect=self.correctness.wrong)


async def capacity(site: Site, case: Case) -> float:
    """Requests/s of this workload that the target answers when it is never idle; measured once."""
    workload = case.workload
    shape = f"{workload.prompt} {workload.output} {workload.base_share}"
    if shape not in site.capacity:
        closed = workload.model_copy(
            update={"arrival": f"closed:{site.callers}", "duration": _CALIBRATION_S, "warmup": 2.0, "burst": None,
                    "cancel": 0.0, "actions": (), "canary": 0.0}
        )  # fmt: skip
        found = await run_case(site, case.model_copy(update={"workload": closed}))
        site.capacity[shape] = found.measures["completed_rate"]
    if site.capacity[shape] <= 0:
        raise TargetGone("the target answered nothing while its capacity was measured")
    return site.capacity[shape]


async def resolved(case: Case, *sites: Site) -> Case:
    """The case with absolute rates, where they are shares of a capacity: of the target's, or of the least of several."""
    arrival = case.workload.arrival
    if not arrivals.relative(arrival):
        return case
    least = min([await capacity(site, case) for site in sites])
    return with_arrival(case, arrivals.absolute(arrival, least))


def with_arrival(case: Case, arrival: str) -> Case:
    """The same case at another rate."""
    return case.model_copy(update={"workload": case.workload.model_copy(update={"arrival": arrival})})


async def run_case(site: Site, case: Case, on_batch: OnBatch = lambda *_: None, tape: Tape | None = None) -> Result:
    """Send the case's tape (or the given one), do its actions meanwhile, and judge what came of it."""
    workload = case.workload
    actions.check(workload.actions, site.own)
    names = asked_adapters(workload, site)
    prompts = site.prompts if site.references and workload.canary else ()
    tape = tape or build(workload, names, len(prompts), canaries.TOKENS)
    records: list[Record] = []
    beats: list[Beat] = []
    started: list[float] = []
    interrupted = False

    def emit(done: list[Record], beat: Beat) -> None:
        records.extend(done)
        beats.append(beat)
        on_batch(done, beat)

    job = Job(tape, site.prompts, workload.seed, workload.duration, workload.drain, workload.max_inflight)
    stage = _stage(site, workload, names)
    try:
        async with _network(site, workload, stage) as spec, _playing(workload, stage, started) as played:
            await drive(job, spec, emit, site.workers, started.append)
            await played
    except asyncio.CancelledError:
        interrupted = True
        if task := asyncio.current_task():
            task.uncancel()  # what was measured is still reported
    start = started[0] if started else time.monotonic()
    end_s = min(workload.duration, time.monotonic() - start) if interrupted else workload.duration
    gone = "" if interrupted else await site.gone()
    return _judged(site, case, tape, start, end_s, records, beats, stage.events if stage else [], interrupted, gone)


def _stage(site: Site, workload: Workload, names: tuple[str, ...]) -> actions.Stage | None:
    if not workload.actions or site.client is None:
        return None
    return actions.Stage(site.client, site.aliases, site.own, names[0] if names else "")


@contextlib.asynccontextmanager
async def _network(site: Site, workload: Workload, stage: actions.Stage | None) -> AsyncIterator[TargetSpec]:
    """Whom the clients ask: the target, or proxies before it where connections are to be disturbed."""
    if stage is None or not any(action.do in NETWORK_ACTIONS for action in workload.actions):
        yield site.spec
        return
    async with proxied(site.spec.addresses) as proxies:
        stage.network = tuple(proxies.values())
        yield replace(site.spec, addresses=tuple(proxies))


@contextlib.asynccontextmanager
async def _playing(
    workload: Workload, stage: actions.Stage | None, started: list[float]
) -> AsyncIterator[asyncio.Task[None]]:
    """The actions, under way as a task; what is left of them at the end is not done any more."""
    task = asyncio.create_task(_play(workload, stage, started))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _play(workload: Workload, stage: actions.Stage | None, started: list[float]) -> None:
    if stage is None:
        return
    while not started:  # noqa: ASYNC110 - the workers start within a second or two
        await asyncio.sleep(0.01)
    stage.start = started[0]
    await actions.play(workload.actions, stage, workload.duration)


def _judged(
    site: Site, case: Case, tape: Tape, start: float, end_s: float, records: list[Record], beats: list[Beat],
    events: list[actions.Event], interrupted: bool, gone: str,
) -> Result:  # fmt: skip
    workload, required = case.workload, case.workload.requirements
    warmup = min(workload.warmup, end_s / 2)
    right = correctness.check(records, site.aliases, site.references, names=site.names)
    noisy = noisy_adapter(workload, tape.adapters)
    measured = measures.table(records, start, warmup, end_s, noisy)
    alone = site.alone_ttft_s
    is_good = measures.good(measured, required.goodness, right.bad_rows, alone)
    found = measures.summary(measured, is_good, alone)
    due = len(records) if tape.callers else int((tape.at < end_s).sum())
    median = percentile(measures.latencies(measured, "ttft"), 0.5)
    healthy = validity.health(records, beats, due, required, alone, median if math.isfinite(median) else 0.0)
    if tape.callers and len(records) >= len(tape):
        healthy.problems.append(f"all {len(tape)} requests were answered before the time was over: use an open arrival")
    checks = verdict.checks(required, measured, is_good, right, site.references, alone)
    checks = verdict.doubted(checks, healthy.late)
    checks += [_refused(event) for event in events if event.error]
    growing = not tape.callers and validity.growing(records, start, warmup, end_s)
    return Result(
        case, tape, start, records, beats, events, found, healthy, right, checks, growing, interrupted, gone
    )  # fmt: skip


def _refused(event: actions.Event) -> verdict.Check:
    name = f"{event.do} {event.adapter}".strip()
    return verdict.Check(name, 0, 1, "count", 1, verdict.Verdict.FAILS, note=event.error)

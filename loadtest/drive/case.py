"""One case from the tape to the verdict, against a target that has been looked at."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engine.client import AsyncClient, RequestError
from loadtest.drive import actions
from loadtest.drive.crew import drive
from loadtest.drive.driver import Job
from loadtest.drive.own_server import OwnServer
from loadtest.drive.proxy import proxied
from loadtest.drive.records import Beat, Record
from loadtest.drive.targets import TargetSpec
from loadtest.errors import BadInput, Exit, TargetGone
from loadtest.judge import canaries, correctness, measures, validity, verdict
from loadtest.judge.aliases import Aliases
from loadtest.judge.statistics import percentile
from loadtest.plan import arrivals
from loadtest.plan.scenario import NETWORK_ACTIONS, Case, Workload
from loadtest.plan.strict import nearest
from loadtest.plan.tape import Tape, build, noisy_adapter

CANARY_PROMPTS = (
    "Classify the support ticket as account, billing, cancel, shipping or technical.\nTicket: My parcel is late.\nCategory:",
    "Write one shell or SQL command.\nTask: count the rows in users\nCommand:",
    "The three largest rivers of Europe are",
)
_MOST_REFERENCES = 24  # adapters with references; beyond these canaries are checked by name and digest alone
_CALIBRATION_S = 8.0
_STILL_S = 5.0  # within which a target must say that it serves when the load is over
OnBatch = Callable[[list[Record], Beat], None]


@dataclass
class Site:
    """A target as it was found: its adapters, their versions, its limits, and its answers when idle."""

    spec: TargetSpec
    client: AsyncClient | None
    own: OwnServer | None = None
    workers: int = 1
    aliases: Aliases = field(default_factory=Aliases)
    adapters: tuple[str, ...] = ()
    callers: int = 16
    slots: int = 0
    about: dict[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = CANARY_PROMPTS
    references: canaries.References | None = None
    capacity: dict[str, float] = field(default_factory=dict)


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


async def look(site: Site) -> None:
    """Find out what the target has. Raises TargetGone when it does not answer."""
    if site.client is None:
        return
    try:
        await site.client.wait_ready(timeout_s=10)
        info = await site.client.engine()
        listed = await site.client.adapters.list()
        for one in listed:
            found = await site.client.adapters.get(one.name)
            site.aliases.digests |= {f"{one.name}@{version.version}": version.digest for version in found.versions}
            site.aliases.initial |= {f"{one.name}@{alias}": version for alias, version in one.aliases.items()}
    except RequestError as error:
        raise TargetGone(f"{site.client.target} does not answer: {error}", "Start it, or use --serve MODEL.") from error
    site.adapters = tuple(one.name for one in listed if "current" in one.aliases)
    site.callers = max(1, info.limits.max_running)
    site.slots = info.limits.max_resident
    site.about = {"engine": info.engine, "base": info.base.name, "fingerprint": info.base.fingerprint}


def asked_adapters(workload: Workload, site: Site) -> tuple[str, ...]:
    """The adapters that a workload asks. Raises BadInput where the target has not got them."""
    wanted = workload.adapters
    if workload.base_share >= 1:
        return ()
    if isinstance(wanted, tuple):
        for name in wanted if site.client else ():
            if name.partition("@")[0] not in site.adapters:
                raise BadInput(f"the target has no adapter {name!r}{nearest(name, site.adapters)}")
        return wanted
    if not site.adapters:
        raise BadInput("the target has no adapters", "Publish some, use --serve MODEL, or ask the base: base_share: 1.")
    if wanted == "all":
        return site.adapters
    if wanted > len(site.adapters):
        raise BadInput(f"{wanted} adapters are asked for, the target has {len(site.adapters)}")
    return site.adapters[:wanted]


async def take_references(site: Site, names: tuple[str, ...], step: Callable[[], None] = lambda: None) -> None:
    """Take the references of all versions of these adapters and of the base, once for all cases."""
    if site.client is None or site.references is not None:
        return
    who = [ref for ref in sorted(site.aliases.digests) if ref.partition("@")[0] in names][:_MOST_REFERENCES]
    try:
        site.references = await canaries.take(site.client, ["", *who], site.prompts, step)
    except RequestError as error:
        raise TargetGone(f"the target did not answer the canaries: {error}") from error


async def resolved(site: Site, case: Case) -> Case:
    """The case with absolute rates: what the target can do of this workload is measured first, where that is needed."""
    workload = case.workload
    if not arrivals.relative(workload.arrival):
        return case
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
    absolute = arrivals.absolute(workload.arrival, site.capacity[shape])
    return case.model_copy(update={"workload": workload.model_copy(update={"arrival": absolute})})


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
    gone = "" if interrupted else await _still_there(site)
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


async def _still_there(site: Site) -> str:
    """Empty, or why the target is no longer there."""
    if site.client is None:
        return ""
    with contextlib.suppress(RequestError):
        await site.client.wait_ready(timeout_s=_STILL_S)
        return ""
    return f"{site.client.target} no longer answers"


def _judged(
    site: Site, case: Case, tape: Tape, start: float, end_s: float, records: list[Record], beats: list[Beat],
    events: list[actions.Event], interrupted: bool, gone: str,
) -> Result:  # fmt: skip
    workload, required = case.workload, case.workload.requirements
    warmup = min(workload.warmup, end_s / 2)
    right = correctness.check(records, site.aliases, site.references, names=site.client is not None)
    noisy = noisy_adapter(workload, tape.adapters)
    measured = measures.table(records, start, warmup, end_s, noisy)
    alone = site.references.alone_ttft_s if site.references else 0.0
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

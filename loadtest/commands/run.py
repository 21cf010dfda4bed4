"""Running scenarios against a target, and leaving a folder behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from loadtest.console import err, out
from loadtest.drive.case import Result, resolved, run_case
from loadtest.drive.fleet import own_adapters
from loadtest.drive.openers import remote, served
from loadtest.drive.records import Beat, Record, Status
from loadtest.drive.site import Site, asked_adapters, take_references
from loadtest.errors import Exit
from loadtest.judge.statistics import percentile
from loadtest.plan import tape as tapes
from loadtest.plan.scenario import Case, Workload, chosen
from loadtest.plan.strict import checked
from loadtest.report import document, texts
from loadtest.report.write import WORDS, new_folder, write


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    names: list[str]
    target: str
    overrides: dict[str, Any]
    serve: Path | None = None
    adapters: list[Path] = field(default_factory=list)
    engine: str = "vllm"
    model: str = ""
    quick: bool = False
    workers: int = 1
    tape: Path | None = None


async def execute(options: Options, folder: Path, *, as_json: bool) -> Exit:
    """Run everything, write the report, print the verdict; returns the exit code."""
    tape = tapes.read(options.tape) if options.tape else None
    wanted = _wanted(options, tape)
    new_folder(folder)
    end_on_sigterm()
    results: list[Result] = []
    async with opened(options, wanted) as site:
        await references(site, wanted)
        for case in wanted:
            result = await shown(site, await resolved(case, site), tape)
            results.append(result)
            if result.interrupted or result.gone:
                break
    data = document.document(results, site, ["loraplex", "loadtest", *sys.argv[1:]])
    write(results, data, folder)
    tell(data, folder, as_json=as_json)
    return document.worst(results)


def tell(data: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """Check what was written, and print it."""
    document.check(data)
    if as_json:
        out.print_json(data=data)
        return
    show(data)
    out.print(f"report: {folder / 'report.html'}")


def end_on_sigterm() -> None:
    """A build server's SIGTERM must leave a report and no server of ours behind, as Ctrl-C does."""
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def show(data: dict[str, Any]) -> None:
    """Print the tables of a run, a comparison or a search, what a reader must know, and the verdict."""
    words = WORDS[data["kind"]]
    if data["kind"] == "run":
        out.print(texts.measures_table(data))
        out.print()
    out.print(words.table(data))
    for note in words.notes(data):
        out.print(Text(f"  {note}", "dim"), soft_wrap=True)
    out.print(f"\n[bold]{words.verdict(data)}[/]")


def _wanted(options: Options, tape: tapes.Tape | None) -> list[Case]:
    if tape is not None:
        longest = float(tape.at.max()) + 1 if not tape.callers else 60.0
        data = {"duration": longest, "warmup": 0, "adapters": tape.adapters, **options.overrides}
        data["arrival"] = f"closed:{tape.callers}" if tape.callers else "constant:1"
        return [Case(scenario="replay", name="", workload=checked(Workload, data, "replay"))]
    return wanted_cases(
        options.names, options.serve, options.adapters, quick=options.quick, overrides=options.overrides
    )


def wanted_cases(
    names: list[str], serve: Path | None, adapters: list[Path], *, quick: bool, overrides: dict[str, Any]
) -> list[Case]:
    """The cases that the command line names; on a server of our own each asks its own adapters."""
    found = chosen(names, quick=quick, overrides=overrides)
    return [own_adapters(case, adapters) for case in found] if serve else found


@contextlib.asynccontextmanager
async def opened(options: Options, wanted: list[Case]) -> AsyncIterator[Site]:
    """The target that the command line names, or one that is started for the run."""
    if options.serve:
        err.print("starting loraplex serve (about half a minute)", style="dim")
        opening = served(options.serve, options.adapters, wanted, options.engine, options.workers)
    else:
        timeout = max(case.workload.timeout for case in wanted)
        opening = remote(options.target, timeout, options.model, options.workers)
    async with opening as site:
        yield site


async def references(site: Site, wanted: list[Case]) -> None:
    """Take references of every adapter that a case with canaries asks."""
    asked = [asked_adapters(case.workload, site) for case in wanted if case.workload.canary]
    if asked:
        names = tuple(dict.fromkeys(name.partition("@")[0] for names in asked for name in names))
        with err.status(f"taking references of {len(names)} adapters, alone and together"):
            await take_references(site, names)


async def shown(site: Site, case: Case, tape: tapes.Tape | None = None) -> Result:
    """Run a case with a live view on a terminal; one line when it ends elsewhere."""
    view = _View(case)
    with Live(view, console=err, refresh_per_second=4, transient=True) if err.is_terminal else contextlib.nullcontext():
        result = await run_case(site, case, view.add, tape)
    err.print(f"{case.title}: {len(result.records)} requests", style="dim")
    await asyncio.sleep(0)
    return result


class _View:
    """How it goes: requests, in flight, TTFT, failures, the client's own lag."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._ttfts: list[float] = []
        self._failed = 0
        self._beats: dict[int, Beat] = {}

    def add(self, records: list[Record], beat: Beat) -> None:
        """Take in what a client process sends."""
        self._beats[beat.worker] = beat
        self._ttfts += [one.times[0] - one.scheduled for one in records if one.times]
        self._failed += sum(one.status not in (Status.OK, Status.CANCELLED) for one in records)

    def __rich__(self) -> Group:
        beats = self._beats.values()
        recent = self._ttfts[-500:]
        lag = max((max(beat.loop_lags, default=0.0) for beat in beats), default=0.0)
        line = (
            f"sent {sum(beat.sent for beat in beats)}, under way {sum(beat.in_flight for beat in beats)}, "
            f"TTFT p50 {percentile(recent, 0.5):.2f} s, p99 {percentile(recent, 0.99):.2f} s, failed {self._failed}, "
            f"client loop lag {lag * 1000:.0f} ms, client CPU {sum(beat.cpu for beat in beats):.0%}"
        )
        return Group(Text(f"{self._case.title}  {self._case.workload.arrival}", "bold"), Text(line))

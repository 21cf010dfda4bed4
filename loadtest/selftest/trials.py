"""The trials: every planted fault must be found and named, clean runs must raise no alarm, percentiles must be true."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine.client import AsyncClient
from loadtest.drive.case import Result, run_case
from loadtest.drive.site import Site, asked_adapters, look, take_references
from loadtest.drive.targets import TargetSpec
from loadtest.judge.canaries import References
from loadtest.judge.measures import ttft
from loadtest.judge.statistics import percentile
from loadtest.plan.scenario import Case, Workload
from loadtest.selftest.server import FAULTS, Script, ScriptedServer

LONG, CLEAN = 100, 20
_FREEZE_S = 0.5
_TIMEOUT_S = 1.5  # long enough for a busy machine; only the one stream that hangs waits for it
_TRUE_S, _TRUE_SHARE = 0.002, 0.02


@dataclass
class Outcome:
    """What the self-test came to."""

    planted: int = 0
    missed: list[str] = field(default_factory=list)
    clean: int = 0
    alarms: list[str] = field(default_factory=list)
    percentiles: list[tuple[str, float, float]] = field(default_factory=list)
    """(which, reported, true), in seconds."""

    @property
    def untrue(self) -> list[str]:
        """Percentiles that are off by more than 2 % and more than 2 ms."""
        return [
            f"{name}: reported {reported * 1000:.2f} ms, true {true * 1000:.2f} ms"
            for name, reported, true in self.percentiles
            if abs(reported - true) > max(_TRUE_S, _TRUE_SHARE * true)
        ]

    @property
    def passed(self) -> bool:
        """Everything found, nothing invented, nothing untrue."""
        return not (self.missed or self.alarms or self.untrue)


def workload(**changes: object) -> Workload:
    """A short, fast load, half of it canaries."""
    base = {
        "duration": 0.6, "warmup": 0, "drain": 2.0, "timeout": _TIMEOUT_S, "arrival": "constant:60", "popularity": "uniform",
        "base_share": 0.2, "prompt": 4, "output": 16, "canary": 0.5,
    }  # fmt: skip
    return Workload.model_validate(base | changes)


@asynccontextmanager
async def site(server: ScriptedServer, references: References | None = None) -> AsyncIterator[Site]:
    """The scripted server as a target, with references: those of another one like it, or taken now."""
    address = f"127.0.0.1:{server.port}"
    async with AsyncClient(address, retries=0) as client:
        found = Site(TargetSpec((address,), _TIMEOUT_S), client, workers=0, references=references)
        await look(found)
        server.script.canary_prompts = found.prompts
        await take_references(found, asked_adapters(workload(), found))
        yield found


async def trial(found: Site, server: ScriptedServer, fault: str, number: int, **changes: object) -> Result:
    """One run with one planted fault (none: ""), another tape each time; `changes` are to the workload."""
    server.reset(Script(fault=fault, fault_at=2 + number % 5, freeze_s=_FREEZE_S, canary_prompts=found.prompts))
    load = workload(seed=number, **changes)
    return await run_case(found, Case(scenario="trial", name=fault or "clean", workload=load))


def seen(fault: str, result: Result) -> bool:
    """Whether the run shows this very fault, with the culprit where there is one."""
    counts, canaries = result.correctness.counts, result.correctness.canaries
    match fault:
        case "stale":
            return counts["misroute"] == 1 and "looks like" in result.correctness.findings[0].detail
        case "misroute" | "drift":
            return canaries[fault] == 1
        case "garbage":
            return canaries["unexplained"] == 1
        case "error" | "broken":
            return result.measures["failed"] == 1 and percentile(_ttfts(result), 1.0) == math.inf
        case "hang":
            return sum(one.status == "timeout" for one in result.records) == 1
        case "freeze":
            # What waited for its turn meanwhile waited from its schedule on: it is not one request that was slow.
            return max(ttfts := _ttfts(result)) > 0.8 * _FREEZE_S and percentile(ttfts, 0.8) > 0.1 and not counts
    return counts[fault] == 1


def alarms(result: Result) -> list[str]:
    """What a clean run must not have."""
    found = [f"{finding.kind}: {finding.detail}" for finding in result.correctness.findings]
    return found + [f"{result.measures['failed']} failed"] * bool(result.measures["failed"])


async def run(server: ScriptedServer, faults: int, clean: int, step: Callable[[str], None] = lambda _: None) -> Outcome:
    """Plant `faults` faults, all kinds in turn, then run `clean` times without, then compare percentiles with the truth."""
    outcome = Outcome()
    async with site(server) as found:
        for number, fault in zip(range(faults), itertools.cycle(FAULTS)):
            step(f"planted: {fault}")
            outcome.planted += 1
            if not seen(fault, result := await trial(found, server, fault, number)):
                outcome.missed.append(f"trial {number}: {fault}; seen: {dict(result.correctness.counts) or 'nothing'}")
        for number in range(clean):
            step("clean run")
            outcome.clean += 1
            outcome.alarms += alarms(await trial(found, server, "", 1000 + number))
        step("percentiles")
        outcome.percentiles = await true_percentiles(found, server)
    return outcome


async def true_percentiles(found: Site, server: ScriptedServer, seconds: float = 4.0) -> list[tuple[str, float, float]]:
    """Reported percentiles beside those of what the server says it sent, when: 5 tokens a message, TTFT 50 to 250 ms."""
    server.reset(Script(ttft_s=tuple(0.05 + 0.002 * at for at in range(100)), gap_s=0.02, bundle=5))
    load = workload(duration=seconds, arrival="constant:50", output=20, canary=0, timeout=5, drain=5)
    result = await run_case(found, Case(scenario="truth", name="", workload=load))
    records = sorted(result.records, key=lambda one: one.scheduled)
    logs = sorted(server.logs, key=lambda log: log.received)
    pairs = list(zip(records, logs, strict=True))
    truth = {
        "ttft": [log.sent[0] - one.scheduled for one, log in pairs],
        "tpot": [(log.sent[-1] - log.sent[0]) / 15 for _, log in pairs],
        "e2e": [log.sent[-1] - one.scheduled for one, log in pairs],
    }
    return [
        (f"{name} {key}", result.measures[name][key], percentile(values, q))
        for name, values in truth.items()
        for key, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    ]


def _ttfts(result: Result) -> list[float]:
    return [ttft(one) for one in result.records]

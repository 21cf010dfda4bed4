"""What one client process of the load test can take: paced messages a second, and how late it then sends.

    python -m loadtest.bench.client '{"gap_s": 0.02}'

is the server: the scripted one of the self-test, in a process of its own, as it costs a core that the client needs. It paces
every stream by the gap, so a second has as many messages as the rate of requests says, until one of the two is too slow.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.table import Table

from loadtest.bench import output
from loadtest.bench.child import Handler, Stop, echo, run_until_signal, serve, start_module
from loadtest.bench.machine import machine
from loadtest.drive.case import Result, run_case
from loadtest.drive.records import Status
from loadtest.drive.site import Site
from loadtest.drive.targets import TargetSpec
from loadtest.plan.scenario import Case, Workload
from loadtest.selftest.server import Script, ScriptedServer

TOKENS = 50  # messages of a stream
GAP_S = 0.02
DRAIN_S = 10.0


async def measure(rates: list[int], seconds: float) -> list[dict[str, float]]:
    """One worker beside one server, at each rate of messages a second."""
    with tempfile.TemporaryDirectory(prefix="loraplex-client-") as scratch, output.progress(len(rates)) as step:
        server, facts = await start_module("scripted server", __name__, {"gap_s": GAP_S}, {}, Path(scratch))
        try:
            found = []
            for rate in rates:
                with step(f"{rate:,} messages/s for {seconds:.0f} s"):
                    found.append(await _at(facts["address"], rate, seconds))
            return found
        finally:
            await server.stop()


async def _at(address: str, rate: int, seconds: float) -> dict[str, float]:
    load = Workload.model_validate({
        "arrival": f"constant:{rate / TOKENS}", "duration": seconds, "warmup": 0, "drain": DRAIN_S, "timeout": 30, "canary": 0,
        "base_share": 1, "prompt": 4, "output": TOKENS,
    })  # fmt: skip
    site = Site(TargetSpec((address,), 30), None, workers=1)
    return summary(await run_case(site, Case(scenario="client", name=f"{rate}", workload=load)), rate)


def summary(result: Result, rate: int) -> dict[str, float]:
    """Messages a second while the load was at its height, lag and CPU."""
    arrivals = [at for one in result.records for at in one.times]
    low, high = result.start + TOKENS * GAP_S, result.start + result.case.workload.duration
    return {
        "offered_per_s": rate,
        "received_per_s": sum(low <= at < high for at in arrivals) / (high - low),
        "answered": sum(one.status is Status.OK for one in result.records),
        "failed": result.measures["failed"],
        "lag_p50_ms": result.health.lag_p50_s * 1000,
        "lag_p99_ms": result.health.lag_p99_s * 1000,
        "cpu": result.health.busiest,
    }


def table(found: list[dict[str, float]]) -> Table:
    """A row for each rate."""
    made = Table(title="One client process", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("offered", "received", "answered", "failed", "dispatch lag p50", "p99", "of a core"):
        made.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        made.add_row(
            f"{one['offered_per_s']:,.0f}/s", f"{one['received_per_s']:,.0f}/s", f"{one['answered']:.0f}",
            f"{one['failed']:.0f}", f"{one['lag_p50_ms']:.2f} ms", f"{one['lag_p99_ms']:.2f} ms", f"{one['cpu']:.0%}",
        )  # fmt: skip
    return made


def client(
    rate: Annotated[list[int] | None, typer.Option(min=TOKENS, help="Messages/s; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=3, help="At each rate.")] = 15.0,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """How many paced messages a second one client process of the load test takes, how late it sends, and what that costs.

    Examples:
      make bench ARGS="client"                    a minute on two cores
      make bench ARGS="client --rate 5000 --rate 8000 --seconds 30"

    Streams of 50 messages, one every 20 ms, from a scripted server in another
    process. client.json goes into the report's folder.
    """
    uvloop.install()
    found = run_until_signal(measure(rate or [1000, 2500, 5000, 7500], seconds))
    path = output.save({"machine": machine(), "seconds": seconds, "rates": found}, report / "client.json")
    if as_json:
        output.write_json({"rates": found})
    else:
        output.show([table(found)])
    output.note(f"written: {path}")


async def _prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    server = ScriptedServer(Script(gap_s=arguments["gap_s"]))
    return {"address": await server.start()}, echo, server.stop


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(_prepare))

"""The harness against a scripted server: all planted faults have to be found, and nothing else."""

from __future__ import annotations

from rich.progress import Progress

from loadtest.console import err, out
from loadtest.errors import Exit
from loadtest.selftest import trials
from loadtest.selftest.server import FAULTS, Script, ScriptedServer


async def execute(*, long: bool) -> Exit:
    """Run the trials and print what was found; returns the exit code."""
    faults, clean = (trials.LONG, trials.CLEAN) if long else (len(FAULTS), 3)
    server = ScriptedServer(Script())
    await server.start()
    try:
        with Progress(console=err, transient=True) as bar:
            task = bar.add_task("self-test", total=faults + clean + 1)
            outcome = await trials.run(
                server, faults, clean, lambda what: bar.update(task, advance=1, description=what)
            )
    finally:
        await server.stop()
    out.print(f"planted faults found: {outcome.planted - len(outcome.missed)} of {outcome.planted}")
    out.print(f"clean runs with an alarm: {len(outcome.alarms)} of {outcome.clean}")
    for name, reported, true in outcome.percentiles:
        out.print(f"{name}: reported {reported * 1000:.2f} ms, true {true * 1000:.2f} ms")
    for problem in (*outcome.missed, *outcome.alarms, *outcome.untrue):
        out.print(f"[red]{problem}[/]")
    return Exit.PASS if outcome.passed else Exit.MISSED

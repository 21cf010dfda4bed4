"""`loraplex loadtest faults`: break things at random under load, and say what everybody else noticed."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.console import err, out
from loadtest.errors import BadInput, Exit
from loadtest.faults.run import Plan, document, run


async def execute(plan: Plan, *, as_json: bool) -> Exit:
    """Run the faults and print what came of them; returns the exit code. Raises BadInput without an adapter to go by."""
    if not (plan.template / "adapter_config.json").is_file():
        raise BadInput(f"there is no adapter in {plan.template}", "Name a folder that PEFT wrote.")
    if task := asyncio.current_task():  # told to end, as by Ctrl-C, no server of ours may stay behind
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        shown = bar.add_task("starting a server", total=plan.count)
        outcome = await run(plan, lambda kind: bar.update(shown, advance=1, description=kind))
    data = document(outcome)
    if as_json:
        out.print_json(data=data)
    else:
        show(data)
    if outcome.wrong:
        return Exit.INCORRECT
    return Exit.PASS if outcome.good else Exit.MISSED


def show(data: dict[str, Any]) -> None:
    """What broke and how that ended, what the others got, and the verdict."""
    table = Table("fault", "times", "how its own request ended", box=None, pad_edge=False)
    for kind, statuses in data["faults"].items():
        ends = ", ".join(f"{number} {status}" for status, number in statuses.items())
        table.add_row(kind, str(sum(statuses.values())), ends)
    out.print(table)
    out.print()
    table = Table("tenant", "requests", "answered", "other statuses", box=None, pad_edge=False)
    for name, statuses in {**data["others"], "victim": data["victim"]}.items():
        rest = ", ".join(f"{number} {status}" for status, number in statuses.items() if status != "OK")
        table.add_row(name, str(sum(statuses.values())), str(statuses.get("OK", 0)), rest)
    out.print(table)
    restarts = data["restarts_s"]
    if restarts:
        longest = max(restarts)
        out.print(f"\n{len(restarts)} restarts, longest {longest:.1f} s; the start took {data['start_s']:.1f} s")
    for problem in (*data["problems"], *data["wrong"], *data["failures_of_others"]):
        out.print(f"[red]{problem}[/]", soft_wrap=True)
    out.print(
        f"\n{sum(sum(one.values()) for one in data['faults'].values())} faults in {data['seconds']:.0f} s: "
        f"{data['without_status']} requests without a final status, {len(data['wrong'])} wrong answers, "
        f"{len(data['failures_of_others'])} failures of other tenants: [bold]{'good' if data['good'] else 'NOT GOOD'}[/]"
    )

"""`make bench ARGS=endurance`: overload, and a soak with changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from engine.client import AsyncClient
from loadtest.bench import output
from loadtest.bench.child import run_until_signal
from loadtest.bench.endurance.load import Load
from loadtest.bench.endurance.overload import overload
from loadtest.bench.endurance.soak import soak
from loadtest.bench.machine import machine
from loadtest.drive.own_server import own_server

PARTS = ("overload", "soak")
_WARM_S, _DEADLINE_S = 20.0, 10.0


@dataclass(frozen=True)
class _Asked:
    model: Path
    adapters: Sequence[Path]
    parts: Sequence[str]
    overload_s: float
    soak_s: float


async def _run(asked: _Asked) -> dict[str, Any]:
    found: dict[str, Any] = {}
    named = [(folder.parent.name, folder) for folder in asked.adapters]
    with output.progress(1 + 4 * ("overload" in asked.parts) + 3 * ("soak" in asked.parts)) as step:
        async with AsyncExitStack() as stack:
            with step("start a server"):
                serving = own_server(asked.model, asked.adapters, (), settings={"max_waiting": 256})
                server = await stack.enter_async_context(serving)
            process = psutil.Process(server.pid)
            client = await stack.enter_async_context(AsyncClient(server.address, timeout_s=120, retries=0))
            load = Load(client, ["", *(name for name, _ in named)], _DEADLINE_S)
            if "overload" in asked.parts:
                found["overload"] = await overload(client, load, process, asked.overload_s, _WARM_S, step)
            if "soak" in asked.parts:
                found["soak"] = await soak(client, load, process, named, asked.soak_s, _WARM_S, step)
    return found


def table(part: str, found: dict[str, Any]) -> Table:
    """One part's figures, as they are named in the JSON."""
    made = Table(title=part, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    for key, value in found.items():
        made.add_row(key, _said(value))
    return made


def _said(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " to ".join(map(_said, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(one)}" for key, one in value.items())
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if value is not None
        else "never"
    )


def endurance(
    model: output.Model = output.DEFAULT_MODEL,
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Adapter folders; default: examples.")
    ] = None,
    parts: Annotated[str, typer.Option(metavar="LIST", help=f"Which parts: {', '.join(PARTS)}.")] = ",".join(PARTS),
    overload_minutes: Annotated[float, typer.Option(min=0.1, help="How long five times too much is asked for.")] = 10,
    soak_minutes: Annotated[float, typer.Option(min=0.1, help="How long the soak lasts.")] = 30,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """Overload and soak: does goodput hold at five times too much, what grows over time, and what is left when it is quiet.

    Examples:
      make bench ARGS="endurance"                         about 48 minutes
      make bench ARGS="endurance --parts overload --overload-minutes 2"

    A server of its own. In overload, peak_per_s is what 64 callers get who
    wait for their answers; a good answer comes within 10 s. endurance.json goes
    into the report's folder.
    """
    chosen = output.chosen("--parts", parts, str, PARTS)
    folders = adapters or sorted(Path("examples").glob("*/v1"))
    found = run_until_signal(_run(_Asked(model, folders, chosen, 60 * overload_minutes, 60 * soak_minutes)))
    data = {"machine": machine(), "overload_minutes": overload_minutes, "soak_minutes": soak_minutes, **found}
    path = output.save(data, report / "endurance.json")
    if as_json:
        output.write_json(data)
    else:
        output.show([table(part, found[part]) for part in chosen])
    output.note(f"written: {path}")

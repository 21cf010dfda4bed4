"""`loraplex doctor`: what this machine is, and what would go wrong."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from engine.commands import output
from engine.commands.params import Json

if TYPE_CHECKING:
    from engine.commands.checkup import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def doctor(
    model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The base model; default: as for serve.")] = None,
    registry: Annotated[
        str | None, typer.Option(metavar="URL_OR_FOLDER", help="The registry; default: as for serve.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", exists=True, dir_okay=False, help="The server's YAML file.")
    ] = None,
    generate: Annotated[bool, typer.Option(help="Start the engine and generate four tokens.")] = True,
    isolation: Annotated[
        bool, typer.Option("--isolation", help="Prove that each request gets its own adapter and nothing else.")
    ] = False,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", exists=True, file_okay=False, help="With --isolation: an adapter to mix; repeatable."
        ),
    ] = None,
    mixes: Annotated[int, typer.Option(min=1, help="With --isolation: how many random batches.")] = 200,
    dtype: Annotated[
        str | None, typer.Option(help="With --isolation: precision; float32 compares token by token.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: what it is, which engine build is installed, and whether a server would work.

    Examples:
      loraplex doctor
      loraplex doctor --model /models/llama-8b --no-generate
      loraplex doctor --isolation
      loraplex doctor --isolation --adapter support/v1 --adapter legal/v1 --mixes 500
      loraplex doctor --json | jq '.checks[] | select(.status != "ok")'

    The settings are those of `loraplex serve`. Starting the engine takes about
    half a minute. Exit code 1 when a check fails.

    --isolation runs adapters (random strong ones, or yours) alone, then in random
    batches with each other and the base while others are loaded and unloaded, and
    compares every token: about a minute for 200 batches on two cores.
    """
    from engine.commands import checkup
    from engine.commands.isolation import check_isolation
    from engine.config import load_settings

    settings = load_settings(config, model=model, registry=registry, dtype=dtype)
    with output.spinner("looking around"):
        findings = checkup.look(settings)
    if isolation or generate:
        output.note("starting the engine: about half a minute")
        if isolation:
            with output.counting("batches", mixes) as on_mix:
                attempt = check_isolation(settings, adapter or [], mixes, on_mix)
                findings.append(asyncio.run(checkup.tried("isolation", attempt)))
        else:
            findings.append(asyncio.run(checkup.tried("generation", checkup.generate_some(settings))))
        gc.collect()  # vLLM's finalisers fail when they run as late as the interpreter's exit
    failed = any(finding.status == "fail" for finding in findings)
    data = {"ok": not failed, "checks": [asdict(finding) for finding in findings]}
    output.emit(data, as_json, lambda: _render(findings, data))
    if failed:
        raise typer.Exit(1)


def _render(findings: list[Finding], data: dict[str, Any]) -> Iterator[RenderableType]:
    made = output.table("", "check", "found", "what to do")
    for finding in findings:
        took = f" ({output.seconds(finding.seconds)})" if finding.seconds >= 0.1 else ""
        made.add_row(Text(finding.status, _STYLES[finding.status]), finding.name, finding.found + took, finding.fix)
    yield made
    yield Text("ready to serve" if data["ok"] else "not ready: see the failed checks", "bold")

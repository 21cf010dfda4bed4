"""Load on a running server: how fast it answers with a number of callers at once.

make loadtest                                                   16 callers, the base model
make loadtest ARGS="--adapter support --adapter legal --callers 32 --requests 200"
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.client import AsyncClient
from loadtest.measures import Sample, Summary, summarize
from loadtest.targets import LoraplexTarget
from loadtest.workload import requests, run

console = Console()


async def load(server: str, adapters: list[str], callers: int, count: int, words: int, tokens: int) -> list[Sample]:
    """Send the requests, with a progress bar on standard error."""
    work = requests(count, words, tokens, adapters or [""])
    async with AsyncClient(server) as client:
        await client.wait_ready(timeout_s=10)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("requests", total=count)
            return await run(LoraplexTarget(client), work, callers, lambda: bar.advance(task))


def show(summary: Summary) -> None:
    """Print a summary as a table."""
    table = Table("measure", "value")
    for name, value in asdict(summary).items():
        table.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    console.print(table)


def main(
    server: Annotated[str, typer.Option(help="host:port of the server.", envvar="LORAPLEX_SERVER")] = "127.0.0.1:50051",
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter to ask, repeatable; default: the base.")] = None,
    callers: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 16,
    count: Annotated[int, typer.Option("--requests", min=1, help="Requests in all.")] = 64,
    words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Send load and print TTFT, ITL and throughput; exit 1 when a request failed."""
    samples = asyncio.run(load(server, adapter or [], callers, count, words, tokens))
    summary = summarize(samples)
    if as_json:
        console.print_json(json.dumps(asdict(summary)))
    else:
        show(summary)
    if summary.failed:
        console.print("first failure:", next(sample.error for sample in samples if sample.error), style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

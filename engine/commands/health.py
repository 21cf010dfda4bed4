"""`loraplex health`: one look at a server's health, for containers and scripts."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from engine.commands import output
from engine.commands.params import DEFAULT_SERVER, Json, Server


def health(
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="How long to wait for it.")
    ] = 3.0,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Ask a server or router whether it serves: exit code 0 if so, else 1.

    Examples:
      loraplex health
      loraplex health --server gpu-1:50051 --timeout 600     # wait for its start

    It asks the standard gRPC health service, which needs no credentials.
    """
    asyncio.run(_wait(server, timeout))
    output.emit({"server": server, "serving": True}, as_json, lambda: [f"{server} is serving"])


async def _wait(server: str, timeout_s: float) -> None:
    from engine.client import connect

    async with connect(server) as client:
        await client.wait_ready(timeout_s)

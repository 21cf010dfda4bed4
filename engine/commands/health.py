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
    http: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Ask /readyz of this HTTP port instead; one of several is enough."),
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Ask a server or router whether it serves: exit code 0 if so, else 1.

    Examples:
      loraplex health
      loraplex health --server gpu-1:50051 --timeout 600     # wait for its start
      loraplex health --http 127.0.0.1:9090                  # in a container

    It asks the standard gRPC health service, which needs no credentials. With
    --http no certificate is asked for or checked: for a look from the same machine.
    """
    if http:
        server = asyncio.run(_ready(http, timeout))
    else:
        asyncio.run(_wait(server, timeout))
    output.emit({"server": server, "serving": True}, as_json, lambda: [f"{server} is serving"])


async def _wait(server: str, timeout_s: float) -> None:
    from engine.client import connect

    async with connect(server) as client:
        await client.wait_ready(timeout_s)


async def _ready(addresses: list[str], timeout_s: float) -> str:
    """The first of the HTTP ports that is ready, by TLS or without. Raises Unavailable."""
    import aiohttp

    from engine.client import Unavailable

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as session:
        for address in addresses:
            for scheme in ("http", "https"):
                try:
                    async with session.get(f"{scheme}://{address}/readyz", ssl=False) as answer:
                        if answer.status == 200:
                            return address
                except (aiohttp.ClientError, TimeoutError, ValueError):
                    continue
    raise Unavailable(f"{' and '.join(addresses)}: not ready")

"""`loraplex adapters`: the group, and how its commands reach a server or a registry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from engine.commands.backends import Backend

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)


@app.callback()
def adapters() -> None:
    """Publish adapters, decide which version answers, and look at both.

    Examples:
      loraplex adapters publish examples/support/v1 support
      loraplex adapters promote support@v2
      loraplex adapters rollback support
      loraplex adapters list --registry s3://adapters/prod

    They talk to a server (--server, or LORAPLEX_SERVER). Most can work on a
    registry itself instead, without a server (--registry).
    """


def run(
    work: Callable[[Backend], Awaitable[T]],
    server: str,
    registry: str | None = None,
    model: Path | None = None,
    *,
    create: bool = False,
) -> T:
    """Do `work` with the server, or with the registry if there is one."""
    from engine.commands.backends import connect

    async def connected() -> T:
        async with connect(server, registry, model, create=create) as backend:
            return await work(backend)

    return asyncio.run(connected())

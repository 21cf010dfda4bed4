"""`loraplex adapters`: what is in a server's engine, and what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.text import Text

from engine.commands import output
from engine.commands.adapters.group import app
from engine.commands.params import DEFAULT_SERVER, Json, Ref, Server

if TYPE_CHECKING:
    from engine.client.adapters import Adapters

T = TypeVar("T")


def _ask(work: Callable[[Adapters], Awaitable[T]], server: str) -> T:
    from engine.client import connect

    async def connected() -> T:
        async with connect(server) as client:
            return await work(client.adapters)

    return asyncio.run(connected())


@app.command()
def preload(ref: Ref, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Load a version into the server's engine, so that its first request does not wait.

    Example:
      loraplex adapters preload support@v2
    """
    from engine.commands import describe

    with output.stages(f"loading {ref}") as report:
        version = _ask(
            lambda adapters: adapters.preload(ref, lambda step: report(step.stage, step.detail, step.fraction)), server
        )
    loaded = describe.ref_of(version)
    output.emit({"loaded": loaded}, as_json, lambda: [Text(f"{loaded} is loaded")])


@app.command()
def pin(ref: Ref, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Keep a version in the server's engine, however long nobody asks for it. Loads it if need be.

    Example:
      loraplex adapters pin support@v2
    """
    _set_pin(ref, server, pinned=True, as_json=as_json)


@app.command()
def unpin(ref: Ref, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Let a pinned version go again when its place is needed.

    Example:
      loraplex adapters unpin support@v2
    """
    _set_pin(ref, server, pinned=False, as_json=as_json)


def _set_pin(ref: str, server: str, *, pinned: bool, as_json: bool) -> None:
    from engine.commands import describe

    with output.spinner(f"{'pinning' if pinned else 'unpinning'} {ref}"):
        version = describe.ref_of(_ask(lambda adapters: adapters.pin(ref, pinned), server))
    text = f"{version} is {'pinned' if pinned else 'no longer pinned'}"
    output.emit({"version": version, "pinned": pinned}, as_json, lambda: [Text(text)])


@app.command()
def unload(ref: Ref, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Take a version out of the server's engine. The next request for it loads it again.

    Example:
      loraplex adapters unload support@v1
    """
    was_there = _ask(lambda adapters: adapters.unload(ref), server)
    text = f"{ref} is unloaded" if was_there else f"{ref} was not loaded"
    output.emit({"ref": ref, "was_resident": was_there}, as_json, lambda: [Text(text)])


@app.command()
def watch(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Only this adapter's changes.", show_default=False)
    ] = "",
    for_s: Annotated[float | None, typer.Option("--for", metavar="SECONDS", help="Stop after this time.")] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Print changes as they happen: publications, alias moves, deletions, loads, evictions, quarantines.

    Examples:
      loraplex adapters watch
      loraplex adapters watch support --json
      loraplex adapters watch --for 60

    With --json every line is a JSON object; the first says that the watch has
    begun. Ctrl-C ends it.
    """

    async def work(adapters: Adapters) -> None:
        try:
            async with asyncio.timeout(for_s):
                await _print_events(adapters, name, as_json)
        except TimeoutError:
            return

    _ask(work, server)


async def _print_events(adapters: Adapters, name: str, as_json: bool) -> None:
    from engine.commands import describe

    async with aclosing(adapters.watch(name, include_engine=True)) as events:
        async for event in events:
            if as_json:
                output.write_json(describe.event_data(event))
            else:
                output.show(describe.event_line(event))

"""`loraplex top`: who is being served, and how well, live."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from engine.commands import output
from engine.commands.params import DEFAULT_SERVER, Json, Server

if TYPE_CHECKING:
    from engine.client import AsyncClient
    from engine.commands.top_frame import Look

_WINDOW_S = 5.0  # that a rate is taken over


def top(
    interval: Annotated[float, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of one interval, and exit.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Watch a server: its load, the adapters in its slots, and how each adapter and tenant is served.

    Examples:
      loraplex top
      loraplex top --server gpu-1:50051 --interval 2
      loraplex top --once                      # one frame, for a terminal or a log
      loraplex top --once --json | jq .tokens_per_s

    Rates are over the latest five seconds, waits and TTFT over the latest 200
    requests of an adapter. Of many adapters and tenants the busiest are shown.
    Where the output is no terminal, or with --json, it is one frame. Ctrl-C
    ends it.
    """
    live = output.out.is_terminal and not once and not as_json
    asyncio.run(_live(server, interval) if live else _once(server, interval, as_json=as_json))


async def _once(server: str, interval: float, *, as_json: bool) -> None:
    from engine.client import connect
    from engine.commands.top_frame import Frame
    from engine.commands.top_view import data, view

    async with connect(server) as client:
        first = await _look(client)
        await asyncio.sleep(interval)
        frame = Frame(server, first, await _look(client))
    output.emit(data(frame), as_json, lambda: view(frame))


async def _live(server: str, interval: float) -> None:
    from rich.console import Group
    from rich.live import Live

    from engine.client import RequestError, connect
    from engine.commands.top_frame import Frame
    from engine.commands.top_view import view

    async with connect(server) as client:
        looks = deque([await _look(client)], maxlen=max(2, round(_WINDOW_S / interval) + 1))
        with Live(console=output.out, screen=True, auto_refresh=False) as screen:
            while True:
                try:
                    looks.append(await _look(client))
                    if looks[0].activity.uptime.ToTimedelta() > looks[-1].activity.uptime.ToTimedelta():
                        looks.clear()  # it was started again
                        continue
                    frame = Frame(server, looks[0], looks[-1])
                    screen.update(Group(*view(frame, output.out.size.height)), refresh=True)
                except RequestError as error:
                    screen.update(Text(f"{server} does not answer: {error.message}", "bold red"), refresh=True)
                await asyncio.sleep(interval)


async def _look(client: AsyncClient) -> Look:
    from engine.commands.top_frame import Look

    engine, activity = await asyncio.gather(client.engine(timeout_s=5), client.activity(timeout_s=5))
    return Look(engine, activity)

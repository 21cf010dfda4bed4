"""What is done to the server while the load runs: adapters come, move and go; processes die; and all of it is written down."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.client import AsyncClient, FailedPrecondition, RequestError
from loadtest.drive.own_server import OwnServer
from loadtest.drive.proxy import Proxy
from loadtest.errors import BadInput, LoadTestError
from loadtest.judge.aliases import Aliases, Move
from loadtest.plan.scenario import NETWORK_ACTIONS, SERVER_ACTIONS, Action

_NOTICED_S = 1.0  # within which a server notices that its engine is dead, and says so


@dataclass(frozen=True)
class Event:
    """An action: when it began and ended (seconds after the start), and what went wrong, if anything did."""

    do: str
    adapter: str
    begun: float
    ended: float
    detail: str = ""
    error: str = ""


@dataclass
class Stage:
    """Everything that actions work on."""

    client: AsyncClient
    aliases: Aliases
    own: OwnServer | None
    popular: str
    network: Sequence[Proxy] = ()
    start: float = 0.0
    events: list[Event] = field(default_factory=list)


def check(actions: tuple[Action, ...], own: OwnServer | None) -> None:
    """Refuse what cannot be done to a server that is not ours."""
    for action in actions:
        if own is None and action.do in SERVER_ACTIONS:
            raise BadInput(f"{action.do} is done to a server that the tool starts itself only", "Use --serve MODEL.")


async def play(actions: tuple[Action, ...], stage: Stage, duration_s: float) -> None:
    """Do every action at its times, until the duration is over."""
    await asyncio.gather(*(_repeat(action, number, stage, duration_s) for number, action in enumerate(actions)))


async def _repeat(action: Action, number: int, stage: Stage, duration_s: float) -> None:
    at, turn = action.at, 0
    while at < duration_s:
        await asyncio.sleep(max(0.0, stage.start + at - time.monotonic()))
        begun = time.monotonic() - stage.start
        detail = error = ""
        try:
            detail = await _do(action, stage, seed=1000 + 100 * number + turn)
        except (RequestError, LoadTestError, OSError) as failure:
            error = str(failure)[:300]
        refused = action.do == "publish_bad"  # it must be
        if refused:
            detail, error = (error, "") if error else ("", "the server accepted a broken adapter")
        name = action.adapter or stage.popular
        stage.events.append(Event(action.do, name, begun, time.monotonic() - stage.start, detail, error))
        turn += 1
        if not action.every:
            return
        at += action.every


async def _do(action: Action, stage: Stage, seed: int) -> str:
    name = action.adapter or stage.popular
    adapters = stage.client.adapters
    match action.do:
        case "promote":
            return await _move(stage, name, forward=True)
        case "rollback":
            return await _move(stage, name, forward=False)
        case "preload":
            return (await adapters.preload(name)).version
        case "unload":
            return await _unload(stage.client, name)
    if action.do in NETWORK_ACTIONS:
        return await _disturb(action, stage.network)
    if stage.own is None:
        raise BadInput(f"{action.do} needs a server of our own")
    if action.do in ("publish", "publish_bad"):
        version = await stage.own.publish(name, seed, broken=action.do == "publish_bad")
        found = await adapters.get(name)
        stage.aliases.digests |= {f"{name}@{one.version}": one.digest for one in found.versions}
        return version
    return (
        await _break_registry(stage.own, action.lasts)
        if action.do == "break_registry"
        else await _hit(action, stage.own)
    )


async def _disturb(action: Action, network: Sequence[Proxy]) -> str:
    if action.do == "drop_connections":
        return f"{sum(proxy.drop() for proxy in network)} connections reset"
    await asyncio.gather(*(proxy.stall(action.lasts) for proxy in network))
    return f"nothing went through for {action.lasts:g} s"


async def _unload(client: AsyncClient, name: str) -> str:
    """Unload; a server that refuses because requests use the adapter is right, and must do it with this very reason."""
    try:
        return "was loaded" if await client.adapters.unload(name) else "was not loaded"
    except FailedPrecondition as refusal:
        if refusal.reason != "NOT_ALLOWED_NOW":
            raise
        return f"refused: {refusal.message}"


async def _move(stage: Stage, name: str, *, forward: bool) -> str:
    """Move `current` to the adapter's next version, or back."""
    found = await stage.client.adapters.get(name)
    versions, now = list(found.adapter.versions), found.adapter.aliases["current"]
    begun = time.monotonic()
    if forward:
        target = versions[(versions.index(now) + 1) % len(versions)]
        change = await stage.client.adapters.promote(name, target, actor="loadtest")
    else:
        change = await stage.client.adapters.rollback(name, actor="loadtest")
    stage.aliases.moves.append(Move(name, "current", change.version, begun, time.monotonic()))
    return f"{now} to {change.version}"


async def _hit(action: Action, own: OwnServer) -> str:
    """Kill or stop the server, or its engine's processes; a killed one has ended when it serves again."""
    match action.do:
        case "kill":
            own.signal(signal.SIGKILL)
            if own.process:
                await asyncio.to_thread(own.process.wait)
            own.start()
            await own.ready()
            return "killed, started again, ready"
        case "stop":
            own.signal(signal.SIGSTOP)
            await asyncio.sleep(action.lasts)
            own.signal(signal.SIGCONT)
            return f"stopped for {action.lasts:g} s"
        case "kill_engine":
            names = own.signal_engine(signal.SIGKILL)
            await asyncio.sleep(_NOTICED_S)
            await own.ready()
            return f"{names} killed, started again by the server, ready"
    names = own.signal_engine(signal.SIGSTOP)
    await asyncio.sleep(action.lasts)
    own.signal_engine(signal.SIGCONT)
    return f"{names} stopped for {action.lasts:g} s"


async def _break_registry(own: OwnServer, seconds: float) -> str:
    with own.without_registry():
        await asyncio.sleep(seconds)
    return f"registry away for {seconds:g} s"

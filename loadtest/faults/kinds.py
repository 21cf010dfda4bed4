"""The faults: each breaks one thing, asks for it, and says which statuses came and what should not have been."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from engine.client import AsyncClient, RequestError
from loadtest.drive.markers import write_marker
from loadtest.drive.own_server import OwnServer
from loadtest.drive.processes import below
from loadtest.faults.damage import DAMAGES, WEIGHTS, Damage
from loadtest.faults.load import PROMPTS, Callers, References, told

_BACK_S = 180.0
_MAY = {"UNAVAILABLE"}  # what another fault at the same time may always cause: the storage or the engine is away


@dataclass
class Scene:
    """Where faults happen. `standing` are the victim's adapters that were asked before, `template` what new ones are like."""

    own: OwnServer
    client: AsyncClient
    victim: Callers
    standing: list[str]
    template: Path
    references: References
    restarts_s: list[float] = field(default_factory=list)
    engine: asyncio.Lock = field(default_factory=asyncio.Lock)  # of whoever does something to its processes
    storage: asyncio.Lock = field(default_factory=asyncio.Lock)
    made: int = 0

    async def publish(self, name: str) -> str:
        """Publish another version of a victim's adapter."""
        self.made += 1
        seed = 10_000 + self.made
        async with self.storage:
            return await self.own.publish(name, seed)

    def fresh(self) -> str:
        """A name that nobody has used."""
        self.made += 1
        return f"fresh-{self.made}"

    def stored(self, ref: str) -> Path:
        """A version's weights in the registry."""
        name, _, version = ref.partition("@")
        return self.own.registry / "adapters" / name / version / WEIGHTS

    async def copy(self, name: str) -> Path:
        """The server's local copy of an adapter's current version."""
        found = await self.client.adapters.get(name)
        digest = next(one.digest for one in found.versions if one.version == found.adapter.aliases["current"])
        return self.own.folder / "cache" / "adapters" / digest.removeprefix("sha256:")

    def other(self) -> Path:
        """Valid weights of another tenant's adapter."""
        return self.template / WEIGHTS

    async def ask(self, adapter: str, rng: random.Random) -> str:
        """Ask as the victim; returns the status."""
        return await self.victim.one(self.client, adapter, rng.choice(PROMPTS))


@dataclass(frozen=True)
class Happened:
    """What came of a fault: the status that its victim saw, and what is wrong with that; empty if nothing."""

    status: str
    problem: str = ""


Fault = Callable[[Scene, random.Random], Awaitable[Happened]]


def judged(status: str, allowed: set[str], what: str = "") -> Happened:
    """Whether a status (its first word) is one that may come of it."""
    code = status.partition(" ")[0]
    return Happened(code, "" if code in allowed | _MAY else f"{what or 'it'} ended {status}")


async def status_of(call: Awaitable[object]) -> str:
    """How a call ended: with OK, or otherwise (`told`)."""
    try:
        await call
    except RequestError as error:
        return told(error)
    return "OK"


def in_registry(damage: Damage) -> Fault:
    """A published version goes bad before it is fetched for the first time: it must not answer."""

    async def fault(scene: Scene, rng: random.Random) -> Happened:
        name = scene.fresh()
        ref = f"{name}@{await scene.publish(name)}"
        async with scene.storage:
            damage(scene.stored(ref), scene.other(), rng)
            return judged(await scene.ask(name, rng), {"DATA_LOSS"})

    return fault


def in_copy(damage: Damage, *, while_loading: bool) -> Fault:
    """The server's own copy goes bad, before or while it is loaded again: the right answer, or a typed refusal."""

    async def fault(scene: Scene, rng: random.Random) -> Happened:
        name = rng.choice(scene.standing)
        copy = await scene.copy(name)
        await status_of(scene.client.adapters.unload(name))  # refused while it is in use: then it breaks under requests
        asked = asyncio.create_task(scene.ask(name, rng))
        if while_loading:
            await asyncio.sleep(rng.uniform(0, 0.05))
        with suppress(FileNotFoundError):  # it is being made
            await asyncio.to_thread(damage, copy / WEIGHTS, scene.other(), rng)
        status = await asked
        again = await scene.ask(name, rng)
        await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)
        allowed = {"OK", "DATA_LOSS", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}
        first = judged(status, allowed)
        return first if first.problem else judged(again, allowed)

    return fault


async def bad_publication(scene: Scene, _: random.Random) -> Happened:
    """NaN in a published adapter: refused, and nothing is there."""
    name = scene.fresh()
    async with scene.storage:
        status = await status_of(scene.own.publish(name, scene.made, broken=True))
    return judged(status, {"INVALID_ARGUMENT"}, "a publication with NaN")


async def extreme(scene: Scene, rng: random.Random) -> Happened:
    """Finite, huge weights: whatever they compute is the victim's own trouble."""
    from safetensors.numpy import load_file, save_file

    folder = scene.own.folder / scene.fresh()
    write_marker(scene.template, folder, scene.made, rank=8)
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor * 10.0 ** rng.choice((1, 2, 3)) for name, tensor in weights.items()}, folder / WEIGHTS)
    async with scene.storage:
        published = await status_of(scene.client.adapters.publish(folder, folder.name))
    if published != "OK":
        return judged(published, {"INVALID_ARGUMENT"}, "its publication")
    return judged(await scene.ask(folder.name, rng), {"OK", "FAILED_PRECONDITION", "INVALID_ARGUMENT"})


async def bad_move(scene: Scene, rng: random.Random) -> Happened:
    """A version that cannot be loaded is promoted, or gets a canary or shadow: refused, and everything stays."""
    name = scene.fresh()
    await scene.publish(name)
    version = await scene.publish(name)
    async with scene.storage:
        rng.choice(DAMAGES)(scene.stored(f"{name}@{version}"), scene.other(), rng)
        adapters = scene.client.adapters
        kind = rng.choice(("promote", "canary", "shadow"))
        if kind == "promote":
            status = await status_of(adapters.promote(name, version))
        elif kind == "canary":
            status = await status_of(adapters.set_canary(name, 0.5, version))
        else:
            status = await status_of(adapters.set_shadow(name, 0.5, version))
        found = (await adapters.get(name)).adapter
    if found.aliases != {"current": "v1"} or found.HasField("canary") or found.HasField("shadow"):
        return Happened(status.partition(" ")[0], f"aliases moved: {dict(found.aliases)}")
    return judged(status, {"DATA_LOSS"}, kind)


async def hot_swap(scene: Scene, rng: random.Random) -> Happened:
    """A promotion to another good version and back, while it is asked."""
    name = scene.fresh()
    for _ in range(2):
        await scene.publish(name)
    asked = [asyncio.create_task(scene.ask(name, rng)) for _ in range(4)]
    statuses = [await status_of(scene.client.adapters.promote(name, "v2"))]
    statuses.append(await status_of(scene.client.adapters.rollback(name)))
    statuses += await asyncio.gather(*asked)
    return judged(next((status for status in statuses if status != "OK"), "OK"), {"OK"})


async def callers_leave(scene: Scene, rng: random.Random) -> Happened:
    """Streams whose callers go away in the middle."""

    async def leave(number: int) -> None:
        options = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 200, "ignore_eos": True}
        stream = scene.client.stream(adapter=rng.choice(scene.standing), **options)  # type: ignore[arg-type]
        with suppress(RequestError):
            async with aclosing(stream) as chunks:
                async for _ in chunks:
                    if rng.random() < 0.4:
                        return

    await asyncio.gather(*(leave(number) for number in range(4)))
    return Happened("CANCELLED")


async def storage_away(scene: Scene, rng: random.Random) -> Happened:
    """The registry goes away and comes back: what is known answers on, the rest is UNAVAILABLE."""
    async with scene.storage:
        with scene.own.without_registry():
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            status = await scene.ask(rng.choice(scene.standing), rng)
    return judged(status, {"OK"})


def stopped(lasts_s: float) -> Fault:
    """The process that computes stands still for a moment."""

    async def fault(scene: Scene, rng: random.Random) -> Happened:
        async with scene.engine:
            for process in _engines(scene.own):
                process.suspend()
            await asyncio.sleep(rng.uniform(0.1, lasts_s))
            for process in _engines(scene.own):
                process.resume()
        return judged(await scene.ask(rng.choice(scene.standing), rng), {"OK"})

    return fault


async def killed(scene: Scene, rng: random.Random) -> Happened:
    """One of the engine's processes is killed: it must be back within the time of a start."""
    async with scene.engine:
        await _until(scene, ready=True)
        begun = time.monotonic()
        rng.choice(_engines(scene.own)).send_signal(signal.SIGKILL)
        await _until(scene, ready=False)
        await _until(scene, ready=True)
        scene.restarts_s.append(time.monotonic() - begun)
    return judged(await scene.ask(rng.choice(scene.standing), rng), {"OK"})


async def _until(scene: Scene, *, ready: bool) -> None:
    async with asyncio.timeout(_BACK_S):
        while (await scene.client.activity()).ready != ready:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.1)


def _engines(own: OwnServer) -> list[psutil.Process]:
    """The processes of vLLM below the server; none with the fake engine."""
    return below(own.process.pid, ("Engine", "Worker")) if own.process else []


def faults(*, processes: bool) -> dict[str, tuple[float, Fault]]:
    """All kinds, with how often each happens; those of processes only if there are any."""
    found: dict[str, tuple[float, Fault]] = {}
    for damage in DAMAGES:
        found[f"{damage.__name__} in the registry"] = (1.0, in_registry(damage))
        found[f"{damage.__name__} in the local copy"] = (1.0, in_copy(damage, while_loading=False))
        found[f"{damage.__name__} while loading"] = (1.0, in_copy(damage, while_loading=True))
    found |= {
        "published with NaN": (1.0, bad_publication),
        "finite but huge": (1.0, extreme),
        "moved to what does not load": (2.0, bad_move),
        "promoted and rolled back": (2.0, hot_swap),
        "callers leave": (1.0, callers_leave),
        "storage away": (1.0, storage_away),
    }
    if processes:
        found |= {
            "engine stands still": (1.0, stopped(1.0)),
            "engine killed": (0.6, killed),
        }
    return found

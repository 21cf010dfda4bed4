"""Running random faults under load, and judging what everybody else got."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.client import AsyncClient
from loadtest.drive.own_server import OwnServer
from loadtest.faults.kinds import Happened, Scene, faults
from loadtest.faults.load import Callers, Ledger, References

_AT_ONCE = 2  # faults
_STANDING = 4  # adapters of the victim that are asked all the time
_OTHERS = ("tenant-a", "tenant-b", "tenant-c")
_RANK = 8


@dataclass
class Outcome:
    """What a run came to."""

    happened: list[tuple[str, Happened]] = field(default_factory=list)
    others: dict[str, Ledger] = field(default_factory=dict)
    victim: Ledger = field(default_factory=Ledger)
    start_s: float = 0.0
    restarts_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    alive: bool = True

    @property
    def without_status(self) -> int:
        """Requests of anybody that got no final status that says something."""
        return sum(ledger.without_status for ledger in (self.victim, *self.others.values()))

    @property
    def wrong(self) -> list[str]:
        """Answers of another adapter than the one that was asked."""
        return [one for ledger in (self.victim, *self.others.values()) for one in ledger.wrong]

    @property
    def failures(self) -> list[str]:
        """Requests of others that failed."""
        return [f"{name}: {one}" for name, ledger in self.others.items() for one in ledger.failures]

    @property
    def problems(self) -> list[str]:
        """Faults that ended otherwise than they may."""
        return [f"{kind}: {one.problem}" for kind, one in self.happened if one.problem]

    @property
    def good(self) -> bool:
        """Whether all that was promised was kept."""
        return self.alive and not (self.without_status or self.wrong or self.failures or self.problems)


@dataclass(frozen=True)
class Plan:
    """What to run: a server of `engine` on `model`, adapters like `template`, so many faults, drawn by `seed`."""

    model: Path
    template: Path
    count: int
    seed: int
    engine: str = "vllm"
    callers: int = 2  # of each tenant
    kinds: Collection[str] = ()  # of faults; none: all
    settings: dict[str, object] = field(default_factory=dict)


async def run(plan: Plan, step: Callable[[str], None]) -> Outcome:
    """Start a server, let tenants ask, break things; `step` is called after each fault with its kind."""
    outcome = Outcome()
    async with _server(plan, outcome) as own, AsyncClient(own.address, timeout_s=180, retries=0) as client:
        own.template = plan.template
        scene = await _scene(plan, own, client, outcome)
        begun = time.monotonic()
        try:
            await _break(plan, scene, outcome, step)
        finally:
            outcome.seconds = time.monotonic() - begun
            outcome.restarts_s = scene.restarts_s
        outcome.alive = (await client.activity()).ready
    return outcome


@asynccontextmanager
async def _server(plan: Plan, outcome: Outcome) -> AsyncIterator[OwnServer]:
    settings: dict[str, object] = {"engine": plan.engine, "max_resident": 6, "max_running": 12, "refresh_s": 0.5}
    settings |= {"max_restarts": 1000, "load_timeout_s": 120, "max_wait_s": 170}
    if plan.engine == "vllm":  # float32, so that an answer does not depend on its batch
        settings |= {"dtype": "float32", "context_length": 512, "kv_cache_gib": 1}
    with tempfile.TemporaryDirectory(prefix="loraplex-faults-") as folder:
        own = OwnServer(Path(folder), plan.model, settings | plan.settings)
        begun = time.monotonic()
        own.start()
        try:
            await own.ready()
            outcome.start_s = time.monotonic() - begun
            yield own
        finally:
            own.stop()


async def _scene(plan: Plan, own: OwnServer, client: AsyncClient, outcome: Outcome) -> Scene:
    """Publish what everybody asks, take references, start the callers."""
    standing = [f"standing-{number}" for number in range(_STANDING)]
    for number, name in enumerate([*_OTHERS, *standing]):
        await own.publish(name, number, _RANK)
    references = References()
    await references.take(client, ["", *_OTHERS, *standing])
    victim = Callers(own.address, "victim", standing, references)
    outcome.victim = victim.ledger
    return Scene(own, client, victim, standing, plan.template, references)


async def _break(plan: Plan, scene: Scene, outcome: Outcome, step: Callable[[str], None]) -> None:
    others = [Callers(scene.own.address, name, [name, name, ""], scene.references) for name in _OTHERS]
    outcome.others = {name: callers.ledger for name, callers in zip(_OTHERS, others, strict=True)}
    for number, callers in enumerate((*others, scene.victim)):
        callers.start(plan.callers, plan.seed + 100 * number)
    try:
        await _faults(plan, scene, outcome, step)
        await asyncio.gather(*(callers.stop() for callers in (*others, scene.victim)))
    finally:
        for callers in (*others, scene.victim):
            callers.cancel()


async def _faults(plan: Plan, scene: Scene, outcome: Outcome, step: Callable[[str], None]) -> None:
    """Every kind once, as far as they go, then by chance; in any order, two at a time."""
    every = faults(processes=plan.engine == "vllm")
    kinds = {kind: fault for kind, fault in every.items() if not plan.kinds or kind in plan.kinds}
    rng = random.Random(plan.seed)
    drawn = list(kinds)[: plan.count]
    drawn += rng.choices(list(kinds), [weight for weight, _ in kinds.values()], k=max(0, plan.count - len(kinds)))
    rng.shuffle(drawn)
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int, kind: str) -> None:
        async with places:
            own_rng = random.Random(f"{plan.seed}/{number}")
            happened = await _happened(kinds[kind][1], scene, own_rng)
            outcome.happened.append((kind, happened))
            step(kind)
            await asyncio.sleep(own_rng.uniform(0, 0.3))

    await asyncio.gather(*(one(number, kind) for number, kind in enumerate(drawn)))


async def _happened(fault: Any, scene: Scene, rng: random.Random) -> Happened:
    with suppress(TimeoutError):
        return await fault(scene, rng)  # type: ignore[no-any-return]
    return Happened("none", "the engine did not come back")


def document(outcome: Outcome) -> dict[str, Any]:
    """The outcome for programs; times in seconds."""
    kinds = sorted({kind for kind, _ in outcome.happened})
    return {
        "good": outcome.good,
        "seconds": outcome.seconds,
        "faults": {kind: _counts([one.status for each, one in outcome.happened if each == kind]) for kind in kinds},
        "problems": outcome.problems,
        "others": {name: dict(ledger.statuses) for name, ledger in outcome.others.items()},
        "victim": dict(outcome.victim.statuses),
        "without_status": outcome.without_status,
        "wrong": outcome.wrong,
        "failures_of_others": outcome.failures,
        "start_s": outcome.start_s,
        "restarts_s": outcome.restarts_s,
        "alive": outcome.alive,
    }


def _counts(statuses: list[str]) -> dict[str, int]:
    return {status: statuses.count(status) for status in sorted(set(statuses))}

"""The judge of canaries: counts how both sides fare, ends a canary that does worse, and does what comes after its time.

Every server judges by what it sees itself. Each decision is one entry of the alias log that is only written if the canary's own
entry is still the latest about it: of two servers, or of a server and an operator, the first is obeyed. A canary that has to go
gets no more requests here even while the log cannot be written.

Time runs by the steady clock from when this server first saw the canary; the wall clock only says how much was over by then. So
a clock that jumps changes nothing while the server runs. One that has jumped before a restart may end a canary too soon, but
not promote it: that takes requests seen by this server, over a tenth of the canary's time at least.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from engine.errors import LoraplexError, NotAllowedNow, Overtaken
from engine.registry.canary import Canary
from engine.registry.catalog import Catalog
from engine.registry.manifest import AliasChange, Trial
from engine.registry.names import CURRENT
from engine.registry.registry import Registry
from engine.runtime.judgement import Tally, breach, numbers, shortfall
from engine.runtime.requests import Answer, Ending
from engine.runtime.residency import Residency
from engine.server.moves import Moves

log = structlog.get_logger(__name__)

_LOOK_S = 1.0
# Of the canary's time: what this server must have seen itself before it promotes, and what it waits for that at most.
_OWN = 0.1
# What says something about the server, its caller or its storage, but nothing about a version.
_NOT_ITS_FAULT = {
    "OVERLOADED",
    "WAITED_TOO_LONG",
    "DEADLINE_UNREACHABLE",
    "QUOTA_EXCEEDED",
    "DRAINING",
    "REGISTRY_UNAVAILABLE",
}


@dataclass
class Watched:
    """A canary, and how its two sides have fared since `seen` (on the steady clock); `before_s` of its time was over then."""

    canary: Canary
    seen: float
    before_s: float
    tallies: dict[str, Tally] = field(default_factory=lambda: {"canary": Tally(), "current": Tally()})

    @property
    def sides(self) -> tuple[Tally, Tally]:
        """The canary's tally and that of the current version."""
        return self.tallies["canary"], self.tallies["current"]


@dataclass(frozen=True)
class Decision:
    """What is to happen to a canary, and why; neither flag set: it goes on."""

    why: str
    end: bool = False
    promote: bool = False
    at_once: bool = False


class Trials:
    """Watches all canaries of the catalog; `who` is written into the alias log."""

    def __init__(
        self,
        registry: Registry,
        catalog: Catalog,
        residency: Residency,
        moves: Moves,
        who: str,
        steady: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._registry = registry
        self._catalog = catalog
        self._residency = residency
        self._moves = moves
        self._who = who
        self._steady = steady
        self._wall = wall
        self._watched: dict[str, Watched] = {}
        self._troubles: dict[str, str] = {}  # by name: why its decision is not written yet

    def began(self, answer: Answer) -> None:
        """Nothing is known about the request yet."""

    def ended(self, answer: Answer, ending: Ending) -> None:
        """Count a request that a canary shared out, unless its end says nothing about the version."""
        if (
            answer.side is None
            or answer.manifest is None
            or ending.code == "CANCELLED"
            or ending.reason in _NOT_ITS_FAULT
        ):
            return
        view = self._catalog.adapters.get(answer.manifest.name)
        if view is None or view.canary is None or view.aliases.get(answer.side) != answer.manifest.version:
            return  # of a canary before this one
        ttft_s = answer.first_token_s - answer.waited_s if answer.first_token_s else 0.0
        self.watch(view.canary).tallies[answer.side].add(failed=ending.code != "OK", ttft_s=ttft_s)

    def watch(self, canary: Canary) -> Watched:
        """What is known about a canary; one that has just been seen starts with nothing."""
        watched = self._watched.get(canary.name)
        if watched is None or watched.canary.sequence != canary.sequence:
            before_s = (self._wall() - canary.began).total_seconds()
            longest_s = canary.trial.seconds if canary.trial else 0.0
            watched = Watched(canary, self._steady(), min(max(before_s, 0.0), longest_s))
            self._watched[canary.name] = watched
        return watched

    def decide(self, watched: Watched) -> Decision:
        """What follows from the numbers and the time."""
        canary, current = watched.sides
        trial = watched.canary.trial
        if trial is None:
            return Decision("not judged: it stands until somebody ends it")
        manifest = self._catalog.adapter(watched.canary.name).manifests[watched.canary.version]
        if manifest.digest in self._residency.quarantined:
            return Decision("canary ended early: an answer of it was not a number (NaN)", end=True, at_once=True)
        if why := breach(trial, canary, current):
            return Decision(f"canary ended early: {why}", end=True, at_once=True)
        return self._when_over(watched, trial)

    def _when_over(self, watched: Watched, trial: Trial) -> Decision:
        own_s = self._steady() - watched.seen
        left_s = trial.seconds - watched.before_s - own_s
        known = numbers(*watched.sides)
        if left_s > 0:
            return Decision(f"{left_s:.0f} s left, then {trial.then}: {known}")
        if trial.then == "end":
            return Decision(f"canary's time is over: {known}", end=True)
        why = shortfall(trial, *watched.sides)
        if why is None and own_s >= _OWN * trial.seconds:
            return Decision(f"canary did well: {known}", promote=True)
        if left_s > -_OWN * trial.seconds or own_s < _OWN * trial.seconds:
            return Decision(f"its time is over, waiting for requests to judge it by: {known}")
        return Decision(f"canary not promoted: {why}", end=True)

    async def run(self) -> None:
        """Look at all canaries, again and again."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Carry out what is due. What fails is tried again at the next look."""
        standing = [name for name in self._catalog.adapters if self._standing(name)]
        for name in self._watched.keys() - set(standing):
            del self._watched[name]
        for name in standing:
            try:
                if canary := self._standing(name):  # as it is now: what was carried out before took its time
                    decision = self.decide(self.watch(canary))
                    if decision.end or decision.promote:
                        await self._carry_out(canary, decision)
            except Exception:  # a bug about one canary must not leave all of them unjudged for good
                log.exception("canary could not be judged", adapter=name)

    def _standing(self, name: str) -> Canary | None:
        view = self._catalog.adapters.get(name)
        return view.canary if view else None

    async def _carry_out(self, canary: Canary, decision: Decision) -> None:
        if decision.at_once:
            self._catalog.suspend(canary)
        try:
            change = await (
                self._promote(canary, decision.why) if decision.promote else self._end(canary, decision.why)
            )
            log.info(
                "canary decided", adapter=canary.name, version=change.version, alias=change.alias, why=decision.why
            )
        except (Overtaken, NotAllowedNow) as error:
            log.info("canary was decided elsewhere", adapter=canary.name, problem=error.message)
        except LoraplexError as error:
            if self._troubles.get(canary.name) != error.message:  # one line for an hour's outage
                self._troubles[canary.name] = error.message
                log.warning("canary is not decided yet", adapter=canary.name, why=decision.why, problem=error.message)
        else:
            self._troubles.pop(canary.name, None)
        await self._catalog.refresh()

    async def _end(self, canary: Canary, why: str) -> AliasChange:
        return await self._registry.end_canary(canary.name, actor=self._who, reason=why, since=canary.sequence)

    async def _promote(self, canary: Canary, why: str) -> AliasChange:
        """Promote; a version that cannot be loaded any more is ended instead."""

        async def switch() -> AliasChange:
            return await self._registry.set_alias(
                canary.name, CURRENT, canary.version, actor=self._who, reason=why, since=canary.sequence
            )

        try:
            return await self._moves.move(canary.name, CURRENT, canary.version, switch, lambda _stage, _detail: None)
        except LoraplexError as error:
            if error.status not in ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "DATA_LOSS"):
                raise
            return await self._end(canary, f"canary not promoted: {error.message}")

"""Shadow traffic: what a version would have answered, found out in room that nobody needs, compared, and dropped.

A copy is made once the caller has its answer, runs as a guest (runtime/spare.py) on a version that is in the engine already,
and has no way back to anybody: what fails in it is counted here, and that is all. Greedy answers are compared token by token.
Of a sampled one two versions differ by chance alone, so both versions are asked again at temperature 0, the current one too.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import structlog

from engine.errors import LoraplexError, NotFinite
from engine.registry.catalog import Catalog
from engine.registry.manifest import Manifest
from engine.registry.shadow import Shadow
from engine.runtime.engine import Engine, EngineRequest, LoadedAdapter, Sampling
from engine.runtime.recent import Recent
from engine.runtime.residency import Residency
from engine.runtime.spare import Spare

log = structlog.get_logger(__name__)

Outcome = Literal["equal", "different", "failed", "dropped"]

_LONGEST_S = 60.0
_LOAD_AGAIN_S = 60.0  # between loads for shadows of one version: each costs the engine a moment


@dataclass(frozen=True)
class Answered:
    """What a version answered, and when the first and the last token came, in seconds from its start in the engine."""

    tokens: Sequence[int]
    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Copied:
    """What a caller asked, as its copies ask it."""

    prompt: Sequence[int]
    sampling: Sampling
    cache_salt: str = ""


@dataclass
class Times:
    """The latest times of one version."""

    first_token: Recent = field(default_factory=Recent)
    total: Recent = field(default_factory=Recent)

    def add(self, answered: Answered) -> None:
        """One more answer."""
        self.first_token.add(answered.first_token_s)
        self.total.add(answered.total_s)


@dataclass
class ShadowReport:
    """How a shadow has answered since it began, or since this server started."""

    shadow: Shadow
    current_version: str = ""
    drawn: int = 0
    compared: int = 0
    equal: int = 0
    asked_greedily: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    last_failure: str = ""
    first_differences: Recent = field(default_factory=Recent)
    current: Times = field(default_factory=Times)
    other: Times = field(default_factory=Times)

    def compare(self, current: Answered, other: Answered) -> Outcome:
        """Count a pair of answers."""
        self.compared += 1
        self.current.add(current)
        self.other.add(other)
        place = first_difference(current.tokens, other.tokens)
        if place is None:
            self.equal += 1
            return "equal"
        self.first_differences.add(place)
        return "different"

    def fail(self, error: LoraplexError) -> Outcome:
        """Count a copy that failed."""
        self.failed[error.status] += 1
        self.last_failure = error.message
        return "failed"

    def drop(self, why: str) -> Outcome:
        """Count a copy that was not made, or not finished."""
        self.dropped[why] += 1
        return "dropped"


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two answers differ, the end of the shorter one included; None if they are equal."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


class Observer(Protocol):
    """Counts what shadows do."""

    def shadow_ended(self, adapter: str, outcome: Outcome) -> None:
        """A copy has ended, or was not even made."""


class Shadows:
    """Makes the copies, and keeps a report of each shadow."""

    def __init__(
        self, engine: Engine, catalog: Catalog, residency: Residency, spare: Spare, observer: Observer | None = None
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._residency = residency
        self._spare = spare
        self._observer = observer
        self._reports: dict[str, ShadowReport] = {}
        self._load_again: dict[str, float] = {}  # when, by digest
        self._numbers = itertools.count(1)

    def report(self, shadow: Shadow) -> ShadowReport:
        """The shadow's report; an earlier one of this name is forgotten."""
        report = self._reports.get(shadow.name)
        if report is None or report.shadow.sequence != shadow.sequence:
            report = self._reports[shadow.name] = ShadowReport(shadow)
        return report

    def copy(self, shadow: Shadow, current: Manifest, answered: Answered, asked: Copied) -> None:
        """Ask the shadow what `current` has answered, if there is room just now; returns at once."""
        report = self.report(shadow)
        report.drawn += 1
        report.current_version = current.version
        if refusal := self._spare.refusal():
            self._count(shadow.name, report.drop(refusal))
            return
        self._spare.run(self._copy(report, current, answered, asked))

    async def _copy(self, report: ShadowReport, current: Manifest, answered: Answered, asked: Copied) -> None:
        try:
            async with asyncio.timeout(_LONGEST_S):
                outcome = await self._compared(report, current, answered, asked)
        except LoraplexError as error:
            outcome = report.fail(error)
        except TimeoutError:
            outcome = report.drop("long")
        except asyncio.CancelledError:
            self._count(report.shadow.name, report.drop("busy"))
            raise
        except Exception:
            log.exception("bug in a shadow", adapter=report.shadow.name)
            report.last_failure = "internal error"
            report.failed["INTERNAL"] += 1
            outcome = "failed"
        self._count(report.shadow.name, outcome)

    async def _compared(self, report: ShadowReport, current: Manifest, answered: Answered, asked: Copied) -> Outcome:
        other = self._catalog.adapter(current.name).manifests.get(report.shadow.version)
        sampled = asked.sampling.temperature > 0
        sampling = replace(asked.sampling, n=1, temperature=0.0, logprobs=None, prompt_logprobs=None)
        greedy = replace(asked, sampling=sampling)
        if other is None or not await self._in_engine(other):
            return report.drop("not loaded")
        if sampled:
            again = await self._ask(current, greedy)
            if again is None:
                return report.drop("not loaded")
            answered = again
        theirs = await self._ask(other, greedy)
        if theirs is None:
            return report.drop("not loaded")
        report.asked_greedily += sampled
        return report.compare(answered, theirs)

    async def _in_engine(self, manifest: Manifest) -> bool:
        """Load the version if that takes a slot from nobody, and leaves another one free."""
        self._residency.check_quarantine(manifest)
        if self._residency.is_resident(manifest.digest):
            return True
        now = time.monotonic()
        if self._residency.free_slots < 2 or now < self._load_again.get(manifest.digest, 0.0):
            return False
        self._load_again[manifest.digest] = now + _LOAD_AGAIN_S
        await self._residency.preload(manifest)
        return True

    async def _ask(self, manifest: Manifest, asked: Copied) -> Answered | None:
        """The version's answer; None if it has left the engine."""
        async with self._residency.borrow(manifest) as adapter:
            if adapter is None:
                return None
            try:
                return await self._generate(adapter, asked)
            except NotFinite:
                self._residency.quarantine(manifest)
                raise

    async def _generate(self, adapter: LoadedAdapter, asked: Copied) -> Answered:
        request = EngineRequest(
            f"s{next(self._numbers)}", asked.prompt, asked.sampling, adapter, cache_salt=asked.cache_salt
        )
        tokens: list[int] = []
        started, first = time.monotonic(), 0.0
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                first = first or time.monotonic() - started
                tokens += delta.token_ids
        return Answered(tokens, first, time.monotonic() - started)

    def _count(self, name: str, outcome: Outcome) -> None:
        if self._observer:
            self._observer.shadow_ended(name, outcome)

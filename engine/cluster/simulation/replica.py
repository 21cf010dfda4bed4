"""A replica in virtual time: real admission before a modelled engine.

All rows of a batch advance by one token a step, and a step's length depends on how many they are. So the engine counts steps,
every request knows at which count it has its first token and its last one, and only when the batch changes does the pace.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from engine.cluster.routing import Report
from engine.cluster.simulation.engine import EngineModel
from engine.runtime.admission import Asked, Rules
from engine.runtime.admission.policy import Decision, Policy
from engine.runtime.admission.tickets import Ticket

_EPSILON = 1e-9
VERSION = frozenset({"v1"})


@dataclass(eq=False)
class Job:
    """A request and what came of it. Times are virtual seconds; `adapter` is empty for the base model."""

    arrived: float
    adapter: str
    rank: int
    prompt_tokens: int
    tokens: int
    router: int = 0
    done: int = 0  # tokens that were made before its replica died
    first: float = -1.0
    finished: float = -1.0
    hit: bool = True
    refused: bool = False
    failovers: int = 0
    replica: str = ""
    ticket: Ticket | None = None


class Residents:
    """The adapters in a modelled engine: what admission asks about them, and when each is ready."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.claimed: Collection[str] = ()
        self.in_use: dict[str, int] = {}
        self._ready: dict[str, float] = {}  # by adapter, least recently used first

    def is_resident(self, digest: str) -> bool:
        """Whether it is in, or on its way."""
        return digest in self._ready

    def names(self) -> Collection[str]:
        """What is in."""
        return self._ready.keys()

    def lease(self, adapter: str, now: float, load_s: float) -> float:
        """Use it; returns when it is ready. Evicts the least recently used one that nobody uses, if it must."""
        ready = self._ready.pop(adapter, None)
        if ready is None:
            if len(self._ready) >= self.capacity:
                idle = next((one for one in self._ready if one not in self.in_use), None)
                if idle is not None:
                    del self._ready[idle]
            ready = now + load_s
        self._ready[adapter] = ready
        self.in_use[adapter] = self.in_use.get(adapter, 0) + 1
        return max(now, ready)

    def release(self, adapter: str) -> None:
        """A request has let go of it."""
        self.in_use[adapter] -= 1
        if not self.in_use[adapter]:
            del self.in_use[adapter]


@dataclass(order=True)
class _Milestone:
    at: float  # in steps
    number: int
    job: Job = field(compare=False)
    last: bool = field(compare=False)


class VirtualReplica:
    """One replica. `later(when, what)` schedules a call; `ended(job, now)` hears of every answer and refusal."""

    def __init__(
        self,
        id: str,  # noqa: A002
        model: EngineModel,
        later: Callable[[float, Callable[[float], None]], None],
        ended: Callable[[Job, float], None],
    ) -> None:
        self.id = id
        self.model = model
        self.residents = Residents(model.slots)
        self.alive = True
        self._later = later
        self._ended = ended
        self._policy = Policy(Rules(max_running=model.places, max_waiting=10_000))
        self._policy.follow(self.residents)
        self._jobs: dict[Ticket, Job] = {}
        self._milestones: list[_Milestone] = []
        self._numbers = itertools.count()
        self._rows = 0
        self._steps = 0.0
        self._synced = 0.0
        self._plan = 0  # counts plans for the next milestone: all but the latest are void

    def arrive(self, job: Job, now: float) -> None:
        """A request comes in."""
        job.replica = self.id
        asked = Asked(
            tenant="all", adapter=job.adapter or None, priority=100 if job.done else 0, places=1,
            prompt_tokens=job.prompt_tokens + job.done, min_tokens=0, max_tokens=job.tokens - job.done,
        )  # fmt: skip
        ticket, decided = self._policy.arrive(asked, now)
        job.ticket = ticket
        self._jobs[ticket] = job
        self._carry_out(decided, now)
        self._later(now + 2.0, self._look)  # admission's own alarm: somebody may have waited too long for a slot

    def die(self, now: float) -> list[Job]:
        """Everything that was here, with what each had got."""
        self.alive = False
        self._sync(now)
        for milestone in self._milestones:
            if milestone.last:
                made = milestone.job.tokens - int(milestone.at - self._steps + 1)
                milestone.job.done = max(milestone.job.done, min(made, milestone.job.tokens - 1))
        return list(self._jobs.values())

    def report(self) -> Report:
        """What it says of itself."""
        return Report(
            base="base", places=self.model.places, slots=self.model.slots, running=self._policy.running,
            waiting=self._policy.waiting, residents=dict.fromkeys(self.residents.names(), VERSION),
            in_use=dict(self.residents.in_use),
        )  # fmt: skip

    @property
    def active(self) -> int:
        """Requests that run or wait."""
        return self._policy.running + self._policy.waiting

    def _look(self, now: float) -> None:
        if self.alive and self._policy.waiting:
            self._carry_out(self._policy.decide(now), now)

    def _carry_out(self, decided: list[Decision], now: float) -> None:
        for ticket, error in decided:
            job = self._jobs[ticket]
            if error is not None:
                job.refused = True
                del self._jobs[ticket]
                self._ended(job, now)
                continue
            ready = now
            if job.adapter:
                resident = self.residents.is_resident(job.adapter)
                ready = self.residents.lease(job.adapter, now, self.model.load(job.rank))
                job.hit = job.hit and resident
            if ready > now:
                self._later(ready, lambda at, job=job: self._begin(job, at))  # type: ignore[misc]
            else:
                self._begin(job, now)

    def _begin(self, job: Job, now: float) -> None:
        if not self.alive or job.replica != self.id:
            return
        self._sync(now)
        self._rows += 1
        prefill = -(-(job.prompt_tokens + job.done) // self.model.chunk)
        first = self._steps + prefill
        heapq.heappush(self._milestones, _Milestone(first, next(self._numbers), job, last=False))
        last = first + job.tokens - job.done - 1
        heapq.heappush(self._milestones, _Milestone(last, next(self._numbers), job, last=True))
        self._plan_next(now)

    def _sync(self, now: float) -> None:
        """Advance the count of steps to now."""
        if self._rows:
            self._steps += (now - self._synced) / self.model.step(self._rows)
        self._synced = now

    def _plan_next(self, now: float) -> None:
        self._plan += 1
        if self._milestones:
            plan = self._plan
            wait = max(0.0, self._milestones[0].at - self._steps) * self.model.step(self._rows)
            self._later(now + wait, lambda at: self._reach(plan, at))

    def _reach(self, plan: int, now: float) -> None:
        if plan != self._plan or not self.alive:
            return
        self._sync(now)
        while self._milestones and self._milestones[0].at <= self._steps + _EPSILON:
            milestone = heapq.heappop(self._milestones)
            if milestone.last:
                self._finish(milestone.job, now)
            elif milestone.job.first < 0:
                milestone.job.first = now
        self._plan_next(now)

    def _finish(self, job: Job, now: float) -> None:
        self._rows -= 1
        job.finished = now
        ticket = job.ticket
        if ticket is None:
            return
        del self._jobs[ticket]
        self._policy.served(ticket, job.tokens - job.done)
        self._policy.leave(ticket, now)
        if job.adapter:
            self.residents.release(job.adapter)
        self._ended(job, now)
        self._carry_out(self._policy.decide(now), now)

"""A replica in virtual time: real admission and residency before a modelled engine.

All rows of a batch advance by one token a step, and a step's length depends on how many they are. So the engine counts steps,
every request knows at which count it has its first token and its last one, and only when the batch changes does the pace.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.cluster.routing import Report
from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.residents import Later, Residents
from engine.runtime.admission import Asked, Rules
from engine.runtime.admission.policy import Decision, Policy
from engine.runtime.admission.tickets import Ticket
from engine.runtime.residency.table import Worth

_EPSILON = 1e-9
VERSION = frozenset({"v1"})


@dataclass(eq=False, slots=True)
class Job:
    """A request and what came of it. Times are virtual seconds; `adapter` is empty for the base model.

    `hit`: each replica that it came to had its adapter loaded by then.
    """

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


@dataclass(order=True)
class _Milestone:
    at: float  # in steps
    number: int
    job: Job = field(compare=False)
    last: bool = field(compare=False)


class VirtualReplica:
    """One replica. `ended` hears of every answer and refusal; whichever adapter has the least `worth` makes way."""

    def __init__(
        self,
        id: str,  # noqa: A002
        model: EngineModel,
        worth: Worth,
        later: Later,
        ended: Callable[[Job], None],
    ) -> None:
        self.id = id
        self.model = model
        self.residents = Residents(model.slots, worth, lambda adapter: model.load(self._ranks[adapter]), later)
        self.alive = True
        self.changes = 0  # counts what has happened here
        self._later = later
        self._ended = ended
        self._policy = Policy(Rules(max_running=model.places, max_waiting=10_000))
        self._policy.follow(self.residents)
        self._jobs: dict[Ticket, Job] = {}
        self._loading: dict[Job, float] = {}  # of those that have a place, when their adapters are ready
        self._ranks: dict[str, int] = {}  # of all adapters that were asked for
        self._milestones: list[_Milestone] = []
        self._numbers = itertools.count()
        self._rows = 0  # in the batch
        self._steps = 0.0
        self._synced = 0.0
        self._plan = 0  # counts plans for the next milestone: all but the latest are void

    def arrive(self, job: Job, now: float) -> None:
        """A request comes in."""
        self.changes += 1
        job.replica = self.id
        if job.adapter:
            self._ranks[job.adapter] = job.rank
            job.hit = job.hit and self.residents.is_resident(job.adapter)
            self.residents.expect(job.adapter)
        asked = Asked(
            tenant="all", adapter=job.adapter or None, priority=100 if job.done else 0, places=1,
            prompt_tokens=job.prompt_tokens + job.done, min_tokens=0, max_tokens=job.tokens - job.done,
        )  # fmt: skip
        ticket, decided = self._policy.arrive(asked, now)
        job.ticket = ticket
        self._jobs[ticket] = job
        self._carry_out(decided, now)

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
        names = self.residents.names()
        return Report(
            base="base", places=self.model.places, slots=self.model.slots, running=self._policy.running,
            waiting=self._policy.waiting, residents=dict.fromkeys(names, VERSION), in_use=self.residents.in_use(),
            ranks={name: self._ranks[name] for name in names},
        )  # fmt: skip

    @property
    def active(self) -> int:
        """Requests that run or wait."""
        return self._policy.running + self._policy.waiting

    @property
    def adapters(self) -> int:
        """Adapters that requests run on."""
        return len(self._policy.slots.running)

    @property
    def waiting_adapters(self) -> int:
        """Adapters that requests wait for and none runs on."""
        return self._policy.waiting_adapters

    def has_slot(self, adapter: str) -> bool:
        """Whether the adapter runs, so that further requests for it need no slot."""
        return adapter in self._policy.slots.running

    def ends(self, now: float) -> list[tuple[float, str]]:
        """When each answer that has a place will end, at the present pace, and its adapter: what no server knows. In order."""
        pace = self.model.step(max(1, self._rows))
        done = self._steps + (now - self._synced) / pace if self._rows else self._steps
        running = [(now + (one.at - done) * pace, one.job.adapter) for one in self._milestones if one.last]
        loading = [(ready + self._length(job) * pace, job.adapter) for job, ready in self._loading.items()]
        return sorted(running + loading)

    def _length(self, job: Job) -> int:
        """Steps from when a request begins until its answer ends."""
        return self.model.prefill(job.prompt_tokens + job.done) + job.tokens - job.done - 1

    def _carry_out(self, decided: list[Decision], now: float) -> None:
        for ticket, error in decided:
            job = self._jobs[ticket]
            if error is not None:
                job.refused = True
                self._end(job, ticket)
                continue
            ready = self.residents.lease(job.adapter, now) if job.adapter else now
            if ready > now:
                self._loading[job] = ready
                self._later(ready, lambda at, job=job: self._begin(job, at))  # type: ignore[misc]
            else:
                self._begin(job, now)
        if (upcoming := self._policy.upcoming()) is not None:
            self.residents.load_ahead(upcoming, now)

    def _begin(self, job: Job, now: float) -> None:
        if not self.alive or job.replica != self.id:
            return
        self._loading.pop(job, None)
        self._sync(now)
        self.changes += 1
        self._rows += 1
        first = self._steps + self.model.prefill(job.prompt_tokens + job.done)
        heapq.heappush(self._milestones, _Milestone(first, next(self._numbers), job, last=False))
        last = self._steps + self._length(job)
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
        self.changes += 1
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
        self._policy.served(ticket, job.tokens - job.done)
        self._policy.leave(ticket, now)
        if job.adapter:
            self.residents.release(job.adapter, now)
        self._end(job, ticket)
        self._carry_out(self._policy.decide(now), now)

    def _end(self, job: Job, ticket: Ticket) -> None:
        del self._jobs[ticket]
        if job.adapter:
            self.residents.forget(job.adapter)
        self._ended(job)

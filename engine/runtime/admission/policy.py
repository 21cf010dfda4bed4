"""Who goes next, and who is turned away. Knows no event loop and no clock: `now` is an argument, so a simulation can drive it.

A place is one answer on the engine. Whoever is chosen and does not fit yet keeps the others waiting until it does, so that a
request for many places is not overtaken for ever.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from engine.errors import DeadlineUnreachable, LoraplexError, Overloaded, QuotaExceeded, WaitedTooLong
from engine.runtime.admission.adapters import Adapter, ResidentSet
from engine.runtime.admission.pace import Pace
from engine.runtime.admission.slots import Slots
from engine.runtime.admission.tenants import ANSWER_TOKEN_COST, PROMPT_TOKEN_COST, Tenant, Tenants
from engine.runtime.admission.tickets import Asked, Queue, Ticket

Decision = tuple[Ticket, LoraplexError | None]  # it runs now, or it is refused

_CHARGE_EVERY = 16  # tokens: charging each one would cost more than it is worth
_LONGEST_RETRY_S = 60.0
_CREDIT_REQUESTS = 4  # of a pause, so many requests' cost are saved up: see engine.runtime.admission.tenants


@dataclass(frozen=True)
class Rules:
    """What admission keeps to. Times are in seconds; a tenant that `weights` leaves out has weight 1.

    The mappings may change meanwhile: `weights` holds for a tenant from when it next begins to wait.
    """

    max_running: int
    max_waiting: int
    max_waiting_per_tenant: int | None = None
    max_wait_s: float = math.inf
    max_wait_per_tenant_s: float = math.inf
    max_adapter_wait_s: float = 10.0
    weights: Mapping[str, float] = field(default_factory=dict)
    waiting_limits: Mapping[str, int] = field(default_factory=dict)  # by tenant, instead of max_waiting_per_tenant


class Policy:
    """The state of all requests. Whoever drives it passes on arrivals, tokens and departures, and carries out `Decision`s."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.running = 0
        self.slots = Slots(rules.max_adapter_wait_s)
        self.tenants = Tenants(rules.weights)
        self._pace = Pace(rules.max_running)
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()  # by arrival
        self._arrivals = 0
        self._longest_s = min(rules.max_wait_s, rules.max_wait_per_tenant_s)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def waiters(self) -> Iterator[tuple[Asked, bool]]:
        """The requests that wait, and whether their adapter has a slot."""
        return ((ticket.asked, ticket.queue.adapter.open) for ticket in self._waiting.values())

    @property
    def waiting_adapters(self) -> int:
        """Adapters that requests wait for and none runs on."""
        return len({asked.adapter for asked, slot in self.waiters() if not slot})

    def follow(self, residents: ResidentSet) -> None:
        """From now on, run no more adapters than these have room for."""
        self.slots.residents = residents

    def arrive(self, asked: Asked, now: float) -> tuple[Ticket, list[Decision]]:
        """A request arrives. It, or others, may run or be refused at once."""
        self._arrivals += 1
        tenant = self.tenants.arriving(asked.tenant, _CREDIT_REQUESTS * self._pace.cost)
        queue = tenant.queue(self.slots.adapter(asked.adapter))
        ticket = Ticket(asked, queue, min(asked.places, self.rules.max_running), self._arrivals, now)
        queue.add(ticket)
        queue.adapter.waiting += 1
        self._waiting[ticket.number] = ticket
        self.tenants.count(ticket, 1)
        self.tenants.file(queue)
        decided = self.decide(now)
        if ticket.waiting and (refusal := self._over_a_limit(ticket, now)):
            decided.append(self._refuse(*refusal))
            decided += self.decide(now)
        return ticket, decided

    def decide(self, now: float) -> list[Decision]:
        """Everybody who runs or is refused now. To be called whenever something may have changed."""
        decided = self._refuse_the_old(now)
        while self._waiting and self.running < self.rules.max_running:
            self._file_all(self.slots.settle(self.tenants.claims, now))
            decision = self._next(now)
            if decision is None:
                break
            decided.append(decision)
        return decided

    def upcoming(self) -> str | None:
        """The adapter that would get a slot if one became free now; None if nobody waits for one."""
        tenant = self.tenants.blocked.first()
        queue = tenant.closed.first() if tenant else None
        return queue.adapter.digest if queue else None

    def due(self) -> float:
        """When `decide` has something to do at the latest, even if nothing happens until then."""
        return next(iter(self._waiting.values())).arrived + self._longest_s if self._waiting else math.inf

    def served(self, ticket: Ticket, tokens: int) -> None:
        """The engine made tokens for a running request, all its answers together."""
        ticket.produced += tokens
        if ticket.produced - ticket.charged >= _CHARGE_EVERY:
            self._charge(ticket)

    def leave(self, ticket: Ticket, now: float) -> None:
        """A request is through, or gone; harmless for one that was refused."""
        if ticket.waiting:
            self._unqueue(ticket)
            self._forget(ticket.queue)
        elif ticket.running:
            ticket.running = False
            self._charge(ticket)
            self._pace.finished(ticket, now)
            self.slots.learn(self._pace.mean_answer_s)
            self.running -= ticket.places
            if self.slots.end(ticket):
                self._file_all([ticket.queue.adapter])
            else:
                self.tenants.file(ticket.queue)
            self._forget(ticket.queue)

    # Choosing

    def _next(self, now: float) -> Decision | None:
        queue = self._next_queue(now)
        if queue is None:
            return None
        ticket = queue.head
        if ticket.arrived < now and now + self._pace.answer_s(ticket.asked) > ticket.asked.deadline:
            return self._refuse(ticket, DeadlineUnreachable(self._retry_s(self.tenants.places)))
        if self.running + ticket.places > self.rules.max_running:
            return None
        self._run(ticket, now)
        return ticket, None

    def _next_queue(self, now: float) -> Queue | None:
        """The open queue whose turn it is, or the closed one whose adapter gets a free slot."""
        tenant = self.tenants.ready.first()
        going_on = tenant.open.first() if tenant else None
        if self.slots.free <= 0 or (next_tenant := self.tenants.blocked.first()) is None:
            return going_on
        starting = next_tenant.closed.first()
        if starting is None or going_on is None:
            return starting or going_on
        urgent = starting.tenant is going_on.tenant and self.slots.urgent(starting, now)
        return starting if urgent or _turn(starting) <= _turn(going_on) else going_on

    def _run(self, ticket: Ticket, now: float) -> None:
        queue = ticket.queue
        queue.tenant.picked(queue)
        self._unqueue(ticket)
        ticket.running = True
        ticket.started = now
        self.running += ticket.places
        if self.slots.start(ticket, now):
            self._file_all([queue.adapter])
        queue.tenant.charge(queue, PROMPT_TOKEN_COST * ticket.asked.prompt_tokens * ticket.places)

    def _charge(self, ticket: Ticket) -> None:
        cost = ANSWER_TOKEN_COST * (ticket.produced - ticket.charged)
        ticket.queue.tenant.charge(ticket.queue, cost)
        ticket.charged = ticket.produced

    # Refusing

    def _over_a_limit(self, ticket: Ticket, now: float) -> tuple[Ticket, LoraplexError] | None:
        """Who has to go because of a request that has to wait: as a rule itself; nobody if there is room."""
        rules, tenant = self.rules, ticket.queue.tenant
        limit = rules.waiting_limits.get(tenant.name, rules.max_waiting_per_tenant)
        if limit is not None and tenant.waiting > limit:
            return ticket, self._quota_exceeded(tenant)
        if self.waiting > rules.max_waiting:
            greedy = max(self.tenants.waiting, key=lambda other: other.waiting / other.weight)
            if greedy.waiting / greedy.weight > tenant.waiting / tenant.weight:
                return greedy.last, self._quota_exceeded(greedy)
            return ticket, Overloaded(self.waiting - 1, retry_after_s=self._retry_s(self.tenants.places))
        if ticket.asked.deadline < math.inf:
            wait_s = self._pace.wait_s(self._ahead(tenant))
            if now + wait_s + self._pace.answer_s(ticket.asked) > ticket.asked.deadline:
                return ticket, DeadlineUnreachable(self._retry_s(self.tenants.places))
        return None

    def _ahead(self, tenant: Tenant) -> float:
        """Places that become free before the tenant's last request has run: no more than all need; it has its share of them."""
        weights = sum(other.weight for other in self.tenants.waiting)
        return min(self.tenants.places, tenant.places * weights / tenant.weight)

    def _quota_exceeded(self, tenant: Tenant) -> QuotaExceeded:
        problem = f"has {tenant.waiting - 1} other requests waiting, more than its share of the queue"
        return QuotaExceeded(tenant.name, problem, self._retry_s(self._ahead(tenant)))

    def _retry_s(self, ahead: float) -> float:
        return min(_LONGEST_RETRY_S, max(1.0, self._pace.wait_s(ahead)))

    def _refuse(self, ticket: Ticket, error: LoraplexError) -> Decision:
        self._unqueue(ticket)
        self._forget(ticket.queue)
        return ticket, error

    def _refuse_the_old(self, now: float) -> list[Decision]:
        decided: list[Decision] = []
        while self.due() <= now:
            ticket = next(iter(self._waiting.values()))
            error: LoraplexError = WaitedTooLong(now - ticket.arrived, self._retry_s(self.tenants.places))
            if self.rules.max_wait_per_tenant_s < self.rules.max_wait_s:
                error = self._quota_exceeded(ticket.queue.tenant)
            decided.append(self._refuse(ticket, error))
        return decided

    # Filing

    def _unqueue(self, ticket: Ticket) -> None:
        queue = ticket.queue
        ticket.waiting = False
        queue.remove(ticket)
        queue.adapter.waiting -= 1
        del self._waiting[ticket.number]
        self.tenants.count(ticket, -1)
        self.tenants.file(queue)

    def _file_all(self, adapters: list[Adapter]) -> None:
        for adapter in adapters:
            for queue in adapter.queues.values():
                self.tenants.file(queue)

    def _forget(self, queue: Queue) -> None:
        self.tenants.forget(queue)
        self.slots.forget(queue.adapter)


def _turn(queue: Queue) -> tuple[tuple[float, int], int, float]:
    """Whose turn it is: by tenant, then priority, then adapter."""
    return queue.tenant.turn, -queue.head.asked.priority, queue.served

"""Whose turn it is: every tenant has a counter of the service that it had, and the least one goes first.

These are the virtual token counters of 'Fairness in Serving Large Language Models' (Sheng et al., OSDI 2024): a prompt token
costs 1, an answer's token 2, divided by the tenant's weight, and who comes back after a pause is lifted to the least counter
of those who wait, less a small credit, so that a pause saves up no more than that. Of two tenants that both have requests
waiting, neither gets ahead of the other by more than the credit and twice the larger of one prompt and all that can be running.

The credit is ours. Without it a tenant that asks for less than its share is lifted, at each of its requests, to the counter of
one that floods the queue: what it left to others meanwhile is forgotten, and its next request waits as if it had had its share.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeVar

from engine.runtime.admission.adapters import Adapter
from engine.runtime.admission.ranking import Ranking
from engine.runtime.admission.tickets import Queue, Ticket

T = TypeVar("T")

PROMPT_TOKEN_COST, ANSWER_TOKEN_COST = 1, 2
_MOST_IDLE = 1024  # tenants without requests whose counters are remembered


class Tenant:
    """Somebody whose requests share a counter; `open` queues may go on now, `closed` ones need a slot first."""

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.served = 0.0
        self.came = 0  # when it began to wait: a number that counts up
        self.waiting = 0
        self.places = 0  # that its waiting requests need
        self.queues: dict[str | None, Queue] = {}
        self.slots = 0  # that its running requests keep, those that are being drained left out
        self.open: Ranking[Queue] = Ranking(lambda queue: (-queue.head.asked.priority, queue.served, queue.head.number))
        self.closed: Ranking[Queue] = Ranking(lambda queue: queue.adapter.claim_of(queue))  # when its claim began
        self._floor = 0.0

    @property
    def turn(self) -> tuple[float, int]:
        """Least goes first: had the least service; of equal ones, who came last, for it has had nothing since."""
        return self.served, -self.came

    @property
    def idle(self) -> bool:
        """Whether it has no request."""
        return not self.queues

    @property
    def last(self) -> Ticket:
        """Who came last of its least urgent requests; one must wait."""
        tails = (queue.tail for queue in self.queues.values() if queue.waiting)
        return max(tails, key=lambda ticket: (-ticket.asked.priority, ticket.number))

    @property
    def claim(self) -> float:
        """When the greatest claim of its closed queues began."""
        first = self.closed.first()
        return math.inf if first is None else first.adapter.claim_of(first)

    def queue(self, adapter: Adapter) -> Queue:
        """Its queue for the adapter; one that begins to wait starts where the others are."""
        queue = self.queues.get(adapter.digest)
        if queue is None:
            queue = self.queues[adapter.digest] = adapter.queues[self.name] = Queue(self, adapter)
        if not queue.waiting:
            queue.served = max(queue.served, self._floor)
        return queue

    def picked(self, queue: Queue) -> None:
        """`queue` was next among its queues."""
        self._floor = max(self._floor, queue.served)

    def charge(self, queue: Queue, cost: float) -> None:
        """Count service."""
        queue.served += cost
        self.served += cost / self.weight


class Tenants:
    """All tenants with requests, and the counters of some that had requests before."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._active: dict[str, Tenant] = {}
        self._idle: OrderedDict[str, Tenant] = OrderedDict()
        self.waiting: Ranking[Tenant] = Ranking(lambda tenant: tenant.turn)
        self.ready: Ranking[Tenant] = Ranking(lambda tenant: tenant.turn)  # those with open queues
        # Those with closed queues: by whose turn it is to get a slot, and by how great a claim they have.
        self.blocked: Ranking[Tenant] = Ranking(lambda tenant: (tenant.slots / tenant.weight, tenant.turn))
        self.claims: Ranking[Tenant] = Ranking(lambda tenant: tenant.claim)
        self.places = 0  # that all waiting requests need
        self._arrivals = itertools.count()
        self._left_last: Tenant | None = None

    def arriving(self, name: str, credit: float) -> Tenant:
        """The tenant of a request that arrives; if it had none waiting, it may be `credit` (cost) below those who wait."""
        tenant = self._active.get(name)
        if tenant is None:
            tenant = self._idle.pop(name, None) or Tenant(name, self._weights.get(name, 1.0))
            self._active[name] = tenant
        if not tenant.waiting:
            tenant.weight = self._weights.get(name, 1.0)  # it is in no ranking now
            tenant.served = max(tenant.served, self._least() - credit / tenant.weight)
            tenant.came = next(self._arrivals)
        return tenant

    def _least(self) -> float:
        least = self.waiting.first() or self._left_last
        return least.served if least else 0.0

    def count(self, ticket: Ticket, change: int) -> None:
        """One request more waits (1), or one less (-1)."""
        tenant = ticket.queue.tenant
        tenant.waiting += change
        tenant.places += change * ticket.places
        self.places += change * ticket.places
        if tenant.waiting:
            self.waiting.put(tenant)
        else:
            self.waiting.discard(tenant)
            self._left_last = tenant

    def file(self, queue: Queue) -> None:
        """Put the queue where it belongs now: among the open ones, the closed ones, or nowhere."""
        tenant, adapter = queue.tenant, queue.adapter
        waits, goes_on = queue.waiting > 0, adapter.open
        _set(tenant.open, queue, waits and goes_on and not adapter.draining)
        _set(tenant.closed, queue, waits and not goes_on)
        _set(self.ready, tenant, len(tenant.open) > 0)
        _set(self.blocked, tenant, len(tenant.closed) > 0)
        _set(self.claims, tenant, len(tenant.closed) > 0)

    def forget(self, queue: Queue) -> None:
        """Forget the queue if nothing waits or runs, and remember of a tenant without any requests its counter only."""
        tenant, adapter = queue.tenant, queue.adapter
        if queue.waiting or queue.running:
            return
        tenant.queues.pop(adapter.digest, None)
        adapter.queues.pop(tenant.name, None)
        if tenant.idle and tenant.name in self._active:
            del self._active[tenant.name]
            self._idle[tenant.name] = tenant
            if len(self._idle) > _MOST_IDLE:
                self._idle.popitem(last=False)


def _set(ranking: Ranking[T], item: T, wanted: bool) -> None:
    (ranking.put if wanted else ranking.discard)(item)

"""Which adapters run at once: never more than the engine holds, and none of them for ever while another one waits.

An adapter runs while a request of it does. Those that do not run need a slot first. A claim on a slot grows with time: it is
worth the time that the adapter's first request has waited, more for every other request that waits for it (a switch is paid
once for all of them) and for a higher priority, and more if the adapter is in the engine already (then there is no switch).
Past the patience a claim is urgent: if no slot is free, one is drained for it. A drained adapter gets no new requests until
its running ones have ended; its slot is then free. Nothing is drained before its turn, as long as the patience, is over.

How long that is follows from how long answers take (`Slots.learn`): an adapter that runs alone keeps its slot from fuller
batches for about an answer, with the draining before. So of S slots it costs the others 1/S of their tokens for that long,
and ten answers' patience, divided by S, keeps that to a tenth. `longest_s` bounds it.

Slots are shared among tenants as tokens are, by weight: a tenant without any takes one from whoever has most; a tenant with
its share of them can only take turns among its own adapters.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from engine.runtime.admission.adapters import Adapter, ResidentSet, Roomy
from engine.runtime.admission.ranking import Ranking
from engine.runtime.admission.tickets import Queue, Ticket

if TYPE_CHECKING:
    from engine.runtime.admission.tenants import Tenant

_FULL_BATCH = 9  # an adapter for which so many wait is urgent at once
_RESIDENT_BONUS = 0.25  # of the patience: what a resident adapter is ahead
_PATIENCE_ANSWERS = 10.0  # divided by the slots; at least one answer
_AT_FIRST_S = 2.0  # as long as nothing is known of answers
_SHORTEST_S = 0.5  # a switch costs tens of milliseconds, too


class Slots:
    """The running adapters, and those that make room."""

    def __init__(self, longest_s: float) -> None:
        self.residents: ResidentSet = Roomy()
        self.running: dict[str, Adapter] = {}
        self.draining: list[Adapter] = []
        self._adapters: dict[str | None, Adapter] = {}  # those with requests
        self._claimed: dict[Adapter, None] = {}
        self._longest_s = longest_s
        self._patience_s = min(longest_s, _AT_FIRST_S)

    def learn(self, answer_s: float) -> None:
        """Be as patient as answers that run for so many seconds ask for; 0 when that is unknown."""
        if answer_s:
            answers = max(1.0, _PATIENCE_ANSWERS / max(1, self.residents.capacity))
            self._patience_s = min(self._longest_s, max(_SHORTEST_S, answers * answer_s))

    @property
    def free(self) -> int:
        """Slots that an adapter could start in; below zero when pins and promotions want more than there are."""
        claimed = self.residents.claimed
        others = sum(digest not in self.running for digest in claimed) if claimed else 0
        return self.residents.capacity - len(self.running) - others

    def adapter(self, digest: str | None) -> Adapter:
        """The adapter, which need not run."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = self._adapters[digest] = Adapter(digest, self.began)
            if digest in self.residents.claimed:
                self._set_claimed(adapter, True)
        return adapter

    def began(self, queue: Queue) -> float:
        """When the queue's claim would have begun, had it grown by waiting alone; for its tenant to choose by."""
        return self._began(queue) - max(0, queue.head.asked.priority) * self._patience_s

    def urgent(self, queue: Queue, now: float) -> bool:
        """Whether a slot must be made free for the queue. A high priority is no reason: it is no merit among tenants."""
        return self._began(queue) <= now - self._patience_s

    def _began(self, queue: Queue) -> float:
        head, adapter = queue.head, queue.adapter
        bonus = min(1.0, (adapter.waiting - 1) / (_FULL_BATCH - 1)) + min(0, head.asked.priority)
        if adapter.digest is not None and self.residents.is_resident(adapter.digest):
            bonus += _RESIDENT_BONUS
        return head.arrived - bonus * self._patience_s

    def start(self, ticket: Ticket, now: float) -> bool:
        """A request runs; returns whether its adapter starts with it."""
        adapter = ticket.queue.adapter
        starts = not adapter.running and adapter.digest is not None
        adapter.running.add(ticket)
        ticket.queue.running += 1
        if ticket.queue.running == 1 and adapter.digest is not None:
            ticket.queue.tenant.slots += 1
        if starts:
            adapter.since = now
            self.running[str(adapter.digest)] = adapter
        return starts

    def end(self, ticket: Ticket) -> bool:
        """A request runs no more; returns whether its adapter stops with it."""
        queue, adapter = ticket.queue, ticket.queue.adapter
        adapter.running.remove(ticket)
        queue.running -= 1
        if not queue.running and adapter.digest is not None:
            queue.tenant.slots -= not adapter.draining
        if adapter.running or adapter.digest is None:
            return False
        del self.running[adapter.digest]
        if adapter.draining:
            adapter.draining = False
            self.draining.remove(adapter)
        return True

    def forget(self, adapter: Adapter) -> None:
        """Forget an adapter that nobody asks for any more."""
        if not adapter.queues:
            self._adapters.pop(adapter.digest, None)
            self._claimed.pop(adapter, None)

    def settle(self, claims: Ranking[Tenant], now: float) -> list[Adapter]:
        """Drain as many adapters as there are urgent claims without a slot; returns those that change."""
        changed = self._follow_claims()
        if self.free > 0 and not self.draining:
            return changed
        ripe = self._ripe(now)
        most = len(self.draining) + len(ripe)
        takers = self._takers(claims, now, most) if most else []
        for taker in takers[len(self.draining) :]:
            if (adapter := _least_deserving(ripe, taker)) is not None:
                ripe.remove(adapter)
                self._drain(adapter)
                changed.append(adapter)
        for adapter in self.draining[len(takers) :]:
            self._reopen(adapter)
            changed.append(adapter)
        return changed

    def _ripe(self, now: float) -> list[Adapter]:
        """Running adapters that could be drained: their turn is over, and nothing else keeps them in the engine."""
        return [
            adapter
            for adapter in self.running.values()
            if now - adapter.since >= self._patience_s and not adapter.draining and not adapter.claimed
        ]

    def _drain(self, adapter: Adapter) -> None:
        adapter.draining = True
        self.draining.append(adapter)
        for tenant in adapter.tenants:
            tenant.slots -= 1

    def _reopen(self, adapter: Adapter) -> None:
        if adapter.draining:
            adapter.draining = False
            self.draining.remove(adapter)
            for tenant in adapter.tenants:
                tenant.slots += 1

    def _follow_claims(self) -> list[Adapter]:
        """Notice pins and promotions that came or went."""
        claimed = self.residents.claimed
        if not claimed and not self._claimed:
            return []
        changed = [adapter for digest in claimed if (adapter := self._adapters.get(digest)) and not adapter.claimed]
        changed += [adapter for adapter in self._claimed if adapter.digest not in claimed]
        for adapter in changed:
            self._set_claimed(adapter, not adapter.claimed)
            self._reopen(adapter)  # draining what stays in the engine anyway makes no room
        return changed

    def _set_claimed(self, adapter: Adapter, claimed: bool) -> None:
        adapter.claimed = claimed
        if claimed:
            self._claimed[adapter] = None
        else:
            self._claimed.pop(adapter, None)

    def _takers(self, claims: Ranking[Tenant], now: float, most: int) -> list[Tenant | None]:
        """For whom slots have to be made free: None for pins and promotions, the owner for an urgent claim."""
        free, bound = self.free, now - self._patience_s
        most += max(0, free)
        urgent: dict[Adapter, tuple[tuple[float, float], Tenant]] = {}
        for tenant in claims.within(bound):
            found = (queue for queue in tenant.closed.within(bound) if self.urgent(queue, now))
            for number, queue in enumerate(islice(found, most)):
                key = ((tenant.slots + number) / tenant.weight, tenant.served)
                if queue.adapter not in urgent or key < urgent[queue.adapter][0]:
                    urgent[queue.adapter] = (key, tenant)
        owners = [tenant for _, tenant in sorted(urgent.values(), key=lambda entry: entry[0])]
        return [*[None] * -free, *owners[max(0, free) :]][:most]


def _least_deserving(adapters: list[Adapter], taker: Tenant | None) -> Adapter | None:
    """Whose slot `taker` may have: of the tenant with most for its weight, and there what is free soonest."""

    def share(tenant: Tenant) -> float:
        return (tenant.slots + (tenant is taker)) / tenant.weight

    fair = share(taker) if taker and taker.slots else 0.0
    shares = [(min(map(share, adapter.tenants)), adapter) for adapter in adapters]
    most = max((held for held, _ in shares if held >= fair), default=None)
    allowed = (adapter for held, adapter in shares if held == most)
    return min(allowed, key=lambda adapter: (adapter.remaining, adapter.since), default=None)

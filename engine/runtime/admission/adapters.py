"""The adapters that requests are for, and what admission has to know about those in the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Protocol

from engine.runtime.admission.tickets import Queue, Ticket

if TYPE_CHECKING:
    from engine.runtime.admission.tenants import Tenant


class ResidentSet(Protocol):
    """What admission has to know about the adapters in the engine."""

    @property
    def capacity(self) -> int:
        """How many there may be at once."""
        ...

    @property
    def claimed(self) -> Collection[str]:
        """Digests that have or want a place there without a request: pinned ones, ones being loaded or promoted."""
        ...

    def is_resident(self, digest: str) -> bool:
        """Whether requests for it can go on without loading it."""
        ...


class Roomy:
    """Room for every adapter: what admission goes by until it is told of an engine's."""

    capacity = sys.maxsize
    claimed: Collection[str] = ()

    def is_resident(self, digest: str) -> bool:
        """All are."""
        return bool(digest)


class Adapter:
    """An adapter that requests run or wait for; the base model, with digest None, is one that needs no slot."""

    def __init__(self, digest: str | None, began: Callable[[Queue], float]) -> None:
        self.digest = digest
        self.queues: dict[str, Queue] = {}  # by tenant
        self.running: set[Ticket] = set()
        self.waiting = 0
        self.since = 0.0
        self.draining = False
        self.claimed = False
        self._began = began

    @property
    def open(self) -> bool:
        """Whether its requests need no further slot."""
        return bool(self.running) or self.claimed or self.digest is None

    def claim_of(self, queue: Queue) -> float:
        """When the queue's claim on a slot would have begun, had it grown by waiting alone."""
        return self._began(queue)

    @property
    def tenants(self) -> Iterator[Tenant]:
        """Who has requests running on it."""
        return (queue.tenant for queue in self.queues.values() if queue.running)

    @property
    def remaining(self) -> int:
        """The most tokens that one of its running requests may still take."""
        return max(ticket.asked.max_tokens - ticket.produced // ticket.places for ticket in self.running)

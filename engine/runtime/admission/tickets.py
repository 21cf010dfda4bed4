"""A request on its way, and the queue of one tenant's requests for one adapter."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.runtime.admission.adapters import Adapter
    from engine.runtime.admission.tenants import Tenant

ANONYMOUS = "anonymous"


@dataclass(frozen=True)
class Asked:
    """What admission has to know about a request. Counts are tokens of the prompt and of one answer.

    `adapter` is a content digest, None the base model; `deadline` is a time on the clock of `now`.
    """

    tenant: str = ANONYMOUS
    adapter: str | None = None
    priority: int = 0
    places: int = 1
    prompt_tokens: int = 0
    min_tokens: int = 0
    max_tokens: int = 1
    deadline: float = math.inf


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits, runs or has left; numbers count up by arrival, times are in seconds."""

    asked: Asked
    queue: Queue
    places: int
    number: int
    arrived: float
    waiting: bool = True
    running: bool = False
    started: float = 0.0
    produced: int = 0
    charged: int = 0


@dataclass(eq=False)
class Queue:
    """One tenant's requests for one adapter: waiting ones by priority, then arrival; of running ones, how many.

    `served` is what the pair has cost, in the unit of engine.runtime.admission.tenants.
    """

    tenant: Tenant
    adapter: Adapter
    served: float = 0.0
    waiting: int = 0
    running: int = 0
    _lanes: dict[int, OrderedDict[int, Ticket]] = field(default_factory=dict)  # by priority; none is empty

    @property
    def head(self) -> Ticket:
        """Who is next; there must be one."""
        return next(iter(self._lanes[max(self._lanes)].values()))

    @property
    def tail(self) -> Ticket:
        """Who would be last; there must be one."""
        return next(reversed(self._lanes[min(self._lanes)].values()))

    def add(self, ticket: Ticket) -> None:
        """Queue up."""
        self.waiting += 1
        self._lanes.setdefault(ticket.asked.priority, OrderedDict())[ticket.number] = ticket

    def remove(self, ticket: Ticket) -> None:
        """Leave the queue, from wherever one is."""
        self.waiting -= 1
        lane = self._lanes[ticket.asked.priority]
        del lane[ticket.number]
        if not lane:
            del self._lanes[ticket.asked.priority]

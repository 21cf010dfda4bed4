"""An engine in virtual time around the admission policy: steps, switches and callers, without an event loop or a clock.

A step takes 25 ms and 2.5 ms for each running answer, and gives each of them a token (this is about what SmolLM2-135M takes
on two cores); loading an adapter that is not resident stops everybody for 40 ms.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from engine.errors import LoraplexError
from engine.runtime.admission.policy import Decision, Policy, Rules
from engine.runtime.admission.tickets import Asked, Ticket

STEP_S, ANSWER_S, SWITCH_S = 0.025, 0.0025, 0.04


class Resident:
    """The adapters in the pretended engine; the one idle for longest makes room."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.claimed: Counter[str] = Counter()
        self.loads = 0
        self._used: dict[str, None] = {}

    def is_resident(self, digest: str) -> bool:
        """Whether it is in."""
        return digest in self._used

    def use(self, digest: str, in_use: Iterable[str]) -> bool:
        """A request begins on it; returns whether it had to be loaded. There must be room for it."""
        loaded = digest not in self._used
        if loaded:
            self.loads += 1
            if len(self._used) >= self.capacity:
                busy = {*in_use, *self.claimed}
                del self._used[next(one for one in self._used if one not in busy)]
        self._used.pop(digest, None)
        self._used[digest] = None
        return loaded


@dataclass
class Record:
    """What became of one request; times are virtual seconds."""

    asked: Asked
    length: int
    arrived: float
    admitted: float | None = None
    finished: float | None = None
    refusal: LoraplexError | None = None

    @property
    def wait(self) -> float:
        """How long it waited for its place."""
        assert self.admitted is not None
        return self.admitted - self.arrived


@dataclass
class Caller:
    """Sends one request after another; each is what to ask, and how long the answer will be."""

    requests: Iterator[tuple[Asked, int]]
    pause_s: float = 0.0


@dataclass
class Simulation:
    """Runs `policy`; look at `records` and `tokens` (of answers, by tenant) afterwards."""

    rules: Rules
    capacity: int
    records: list[Record] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    on_step: Callable[[Simulation], None] = lambda _: None

    def __post_init__(self) -> None:
        self.policy = Policy(self.rules)
        self.resident = Resident(self.capacity)
        self.policy.follow(self.resident)
        self.now = 0.0
        self.running: dict[Ticket, Record] = {}
        self._waiting: dict[Ticket, Record] = {}
        self._arrivals: list[tuple[float, int, Asked, int, Caller | None]] = []
        self._callers: dict[int, Caller] = {}  # by identity of the record
        self._numbers = itertools.count()
        self._switching_s = 0.0

    def send(self, at: float, asked: Asked, length: int, caller: Caller | None = None) -> None:
        """A request will arrive."""
        heapq.heappush(self._arrivals, (at, next(self._numbers), asked, length, caller))

    def call(self, caller: Caller, at: float = 0.0) -> None:
        """A caller sends the next request, if there is another."""
        if (request := next(caller.requests, None)) is not None:
            self.send(at, *request, caller)

    def run(self, until: float) -> Simulation:
        """Let time pass."""
        while self.now < until:
            self._step(until)
        return self

    def _step(self, until: float) -> None:
        if not self.running:
            self.now = min(until, self._arrivals[0][0]) if self._arrivals else until
        ends = self.now
        if self.running:
            ends += STEP_S + ANSWER_S * self.policy.running + self._switching_s
            self._switching_s = 0.0
        working = list(self.running)
        while self._arrivals and self._arrivals[0][0] <= ends:
            self._arrive(*heapq.heappop(self._arrivals))
        self.now = ends
        for ticket in working:
            self._token(ticket)
        self._cancel_the_late()
        self._carry_out(self.policy.decide(self.now))
        self.on_step(self)

    def _arrive(self, at: float, _: int, asked: Asked, length: int, caller: Caller | None) -> None:
        record = Record(asked, length, at)
        self.records.append(record)
        if caller:
            self._callers[id(record)] = caller
        self.now = max(self.now, at)
        ticket, decided = self.policy.arrive(asked, self.now)
        self._waiting[ticket] = record
        self._carry_out(decided)

    def _token(self, ticket: Ticket) -> None:
        record = self.running[ticket]
        self.policy.served(ticket, ticket.places)
        self.tokens[record.asked.tenant] += ticket.places
        if ticket.produced >= record.length * ticket.places:
            del self.running[ticket]
            self.policy.leave(ticket, self.now)
            self._over(record)

    def _cancel_the_late(self) -> None:
        """What gRPC does when a call's deadline passes."""
        for group in (self._waiting, self.running):
            for ticket in [ticket for ticket in group if ticket.asked.deadline < self.now]:
                del group[ticket]
                self.policy.leave(ticket, self.now)

    def _over(self, record: Record) -> None:
        record.finished = self.now
        if caller := self._callers.pop(id(record), None):
            self.call(caller, self.now + caller.pause_s)

    def _carry_out(self, decided: list[Decision]) -> None:
        for ticket, error in decided:
            record = self._waiting.pop(ticket)
            if error:
                record.refusal = error
                self._over(record)
                continue
            record.admitted = self.now
            digest = record.asked.adapter
            if digest and self.resident.use(digest, self.policy.slots.running):
                self._switching_s += SWITCH_S
            self.running[ticket] = record


def endless(random_: random.Random, pick: Callable[[], Asked], low: int, high: int) -> Iterator[tuple[Asked, int]]:
    """Requests without end, their answers between `low` and `high` tokens long."""
    while True:
        yield pick(), random_.randint(low, high)

"""The asyncio shell around the policy: a place for the time of a block."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from engine.errors import Draining, LoraplexError
from engine.runtime.admission.adapters import ResidentSet
from engine.runtime.admission.policy import Decision, Policy, Rules
from engine.runtime.admission.tickets import Asked, Ticket

Outcome = Literal["admitted", "refused", "cancelled"]


class Observer(Protocol):
    """Counts what admission does."""

    def waited(self, outcome: Outcome, seconds: float) -> None:
        """A request's wait is over."""

    def refused(self, reason: str) -> None:
        """A request was refused, with this error's `reason`."""


class Place:
    """A running request's hold on the engine."""

    def __init__(self, policy: Policy, ticket: Ticket) -> None:
        self._policy = policy
        self._ticket = ticket

    def served(self, tokens: int) -> None:
        """Tell how many tokens the engine has made since the last time."""
        self._policy.served(self._ticket, tokens)


class Admission:
    """Hands out the engine's places, as `Policy` decides."""

    def __init__(self, rules: Rules, observer: Observer | None = None) -> None:
        self.rules = rules
        self.draining = False
        self.on_change: Callable[[], None] = lambda: None  # called when somebody has come, started or left
        self.on_upcoming: Callable[[str], None] = lambda _digest: None  # told whose adapter is next to get a slot
        self._policy = Policy(rules)
        self._observer = observer
        self._futures: dict[Ticket, asyncio.Future[None]] = {}  # of those who wait
        self._idle = asyncio.Event()
        self._idle.set()
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """Places taken."""
        return self._policy.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._policy.waiting

    @property
    def waiting_tokens(self) -> int:
        """Tokens that those requests may take, prompts and answers."""
        return sum(asked.prompt_tokens + asked.places * asked.max_tokens for asked, _ in self._policy.waiters())

    @property
    def waiting_adapters(self) -> int:
        """Adapters that requests wait for and none runs on."""
        return self._policy.waiting_adapters

    @property
    def running_adapters(self) -> int:
        """Adapters that requests run on."""
        return len(self._policy.slots.running)

    def follow(self, residents: ResidentSet) -> None:
        """From now on, run no more adapters than these have room for. They call `wake` when their claims change."""
        self._policy.follow(residents)

    @asynccontextmanager
    async def place(self, asked: Asked) -> AsyncIterator[Place]:
        """Hold as many places as the request has answers (never more than there are) for the time of the block.

        Raises Draining after `drain`; Overloaded, QuotaExceeded or DeadlineUnreachable at once, or later on when the
        place in the queue is needed for somebody who has more right to it; WaitedTooLong when the wait gets too long.
        """
        ticket = await self._enter(asked)
        try:
            yield Place(self._policy, ticket)
        finally:
            self._leave(ticket)

    def drain(self) -> None:
        """Refuse new requests; the ones that run or wait already go on."""
        self.draining = True
        self.on_change()

    async def until_idle(self) -> None:
        """Return when nothing runs or waits."""
        await self._idle.wait()

    def wake(self) -> None:
        """Look again who may go on."""
        self._carry_out(self._policy.decide(time.monotonic()))

    async def _enter(self, asked: Asked) -> Ticket:
        now = time.monotonic()
        outcome: Outcome = "refused"
        try:
            ticket = await self._admitted(asked, now)
            outcome = "admitted"
            return ticket
        except LoraplexError as error:
            if self._observer:
                self._observer.refused(error.reason)
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            if self._observer:
                self._observer.waited(outcome, time.monotonic() - now)

    async def _admitted(self, asked: Asked, now: float) -> Ticket:
        if self.draining:
            raise Draining
        ticket, decided = self._policy.arrive(asked, now)
        self._idle.clear()
        try:
            for decision in decided:
                if decision[0] is ticket and decision[1]:
                    raise decision[1]
        finally:
            self._carry_out(decided)
        if ticket.waiting:
            future = self._futures[ticket] = asyncio.get_running_loop().create_future()
            try:
                await future
            except asyncio.CancelledError:
                self._leave(ticket)  # it waits, or was admitted in the same instant: the place goes to the next
                raise
            finally:
                self._futures.pop(ticket, None)
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        self._policy.leave(ticket, time.monotonic())
        self.wake()

    def _carry_out(self, decided: list[Decision]) -> None:
        for ticket, error in decided:
            future = self._futures.get(ticket)
            if future is None or future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        if not self._policy.running and not self._policy.waiting:
            self._idle.set()
        elif (upcoming := self._policy.upcoming()) is not None:
            self.on_upcoming(upcoming)
        self.on_change()
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Wake up when somebody has waited too long. An alarm that is early is not worth being put off."""
        if self._alarm is not None or math.isinf(due := self._policy.due()):
            return
        self._alarm = asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self.wake()

"""Who goes next: a bounded number of requests run, a bounded number wait, and one more is told at once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.errors import Draining, Overloaded

_Waiter = tuple[int, int, int, asyncio.Future[None]]  # minus priority, arrival number, places, woken when admitted


class Admission:
    """Hands out `max_running` places on the engine; higher priority first, then first come, first served."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running = 0
        self.draining = False
        self._waiters: list[_Waiter] = []
        self._arrivals = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return sum(not waiter[3].done() for waiter in self._waiters)

    @asynccontextmanager
    async def place(self, priority: int = 0, places: int = 1) -> AsyncIterator[None]:
        """Hold `places` places (one per answer of the request; never more than there are) for the time of the block.

        Raises Draining after `drain`, and Overloaded when `max_waiting` requests wait already.
        """
        places = min(places, self.max_running)
        await self._enter(priority, places)
        try:
            yield
        finally:
            self._leave(places)

    def drain(self) -> None:
        """Refuse new requests; the ones that run or wait already go on."""
        self.draining = True

    async def until_idle(self) -> None:
        """Return when nothing runs or waits."""
        await self._idle.wait()

    async def _enter(self, priority: int, places: int) -> None:
        if self.draining:
            raise Draining
        if not self.waiting and self.running + places <= self.max_running:
            self._take(places)
            return
        if (waiting := self.waiting) >= self.max_waiting:
            raise Overloaded(waiting)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (-priority, next(self._arrivals), places, admitted))
        self._idle.clear()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():
                self._leave(places)  # admitted in the same instant: give the place back
            else:
                admitted.cancel()
                self._wake()
            raise

    def _take(self, places: int) -> None:
        self.running += places
        self._idle.clear()

    def _leave(self, places: int) -> None:
        self.running -= places
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            _, _, places, admitted = self._waiters[0]
            if not admitted.done() and self.running + places > self.max_running:
                break
            heapq.heappop(self._waiters)
            if not admitted.done():
                self._take(places)
                admitted.set_result(None)
        if not self.running and not self._waiters:
            self._idle.set()

"""The Fleet: who is where. Replicas report to it, routers and people ask it.

All it knows comes from heartbeats, so after a restart it knows everything again within seconds; until then it tells nobody that
replicas are gone, nor does it when its process stood still and so heard nobody. It is on the way of no request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

HEARTBEAT_S = 0.5
_EXPIRED_S = 6.0  # without a heartbeat, after which a replica is not listed any more
_SETTLE_S = 3.0  # after a start, or after standing still: the time until every replica has reported
_STILL_S = 4.5  # for a wait of HEARTBEAT_S, above which this process stood still; less than after which replicas expire
_LONG_POLL_S = 5.0


class Fleet:
    """Addresses, reports and who shall drain. Methods are called through Ray, by any number of callers at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._seen: dict[str, float] = {}
        self._reports: dict[str, bytes] = {}
        self._draining: set[str] = set()
        self._changed = asyncio.Event()

    async def heartbeat(self, address: str, report: bytes) -> bool:
        """A replica is there; `report` is its GetEngineResponse. Returns whether it should drain and end."""
        if address not in self._seen:
            self._changed.set()
        self._seen[address] = self._clock()
        self._reports[address] = report
        return address in self._draining

    async def leave(self, address: str) -> None:
        """A replica is about to end."""
        self._seen.pop(address, None)
        self._reports.pop(address, None)
        self._draining.discard(address)
        self._changed.set()

    async def addresses(self, known: list[str] | None = None) -> list[str] | None:
        """Where the replicas are. With what is `known` already: as soon as it differs, or None after a while."""
        until = self._clock() + _LONG_POLL_S
        while True:
            current = self._fresh()
            if self._settled() and current != known:
                return current
            if self._clock() >= until:
                return None
            self._changed.clear()
            before = self._clock()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S)
            if self._clock() - before > _STILL_S:
                self._started = self._clock()  # it stood still: that it heard of nobody says nothing about them

    async def reports(self) -> dict[str, bytes]:
        """The latest GetEngineResponse of every replica."""
        return {address: self._reports[address] for address in self._fresh()}

    async def drain(self, address: str) -> bool:
        """Have a replica finish its work and end; another one takes its place. False if there is none at this address."""
        if address not in self._fresh():
            return False
        self._draining.add(address)
        return True

    def _settled(self) -> bool:
        return self._clock() - self._started > _SETTLE_S

    def _fresh(self) -> list[str]:
        now = self._clock()
        for address in [one for one, seen in self._seen.items() if now - max(seen, self._started) > _EXPIRED_S]:
            del self._seen[address], self._reports[address]
            self._draining.discard(address)
        return sorted(self._seen)

"""Calls that change something and are under way: a server that stops takes no new ones, and waits for these."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import Draining
from engine.server.identity.rights import Need


class Acts:
    """Counts them. Generation is admission's; reading may go on, and watches have no end."""

    def __init__(self) -> None:
        self.under_way = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def counted(self, need: Need | None) -> Iterator[None]:
        """For the time of the block, a call with this need is under way. Raises Draining after `drain` if it is an act."""
        if need is None or not need.audited:
            yield
            return
        if self._draining:
            raise Draining
        self.under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.under_way -= 1
            if not self.under_way:
                self._idle.set()

    def drain(self) -> None:
        """Refuse new ones."""
        self._draining = True

    async def until_idle(self) -> None:
        """Return when none is under way."""
        await self._idle.wait()

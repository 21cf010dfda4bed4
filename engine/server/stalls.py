"""Callers that stop taking or sending in the middle of a call: they give back what they hold after a minute.

A reader that takes nothing has gRPC wait for it without end, and with it the place in the engine and the adapter's slot.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

STALLED_S = 60.0
_LOOK_S = 5.0  # between looks at who is being waited for


class Stallable(Protocol):
    """A call that can be ended."""

    def stalled(self) -> None:
        """Its reader takes nothing."""


class Stalls:
    """Watches the messages that are being written. Costs a call two entries in a dictionary for each message."""

    def __init__(self) -> None:
        self._since: dict[Stallable, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def writes(self, call: Stallable) -> None:
        """A message of the call is about to be written."""
        loop = asyncio.get_running_loop()
        self._since[call] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(min(_LOOK_S, STALLED_S), self._look)

    def wrote(self, call: Stallable) -> None:
        """It was taken, or the call is over."""
        self._since.pop(call, None)

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        for call, since in list(self._since.items()):
            if loop.time() - since >= STALLED_S:
                del self._since[call]
                call.stalled()
        if self._since:
            self._timer = loop.call_later(min(_LOOK_S, STALLED_S), self._look)

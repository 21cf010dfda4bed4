"""Room that real requests leave over. Guests run in it, and are sent away the moment that anybody needs it.

Guests are below every class of admission: it does not know them, so they can neither delay nor displace a request. They enter
while nothing waits and at least half of the engine is free, and are cancelled as soon as that ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Literal

from engine.runtime.admission import Admission

Refusal = Literal["busy", "in flight"]


class Spare:
    """At most `most` guests at once."""

    def __init__(self, admission: Admission, most: int) -> None:
        self._admission = admission
        self._most = most
        self._places = max(1, admission.rules.max_running // 2)
        self._guests: set[asyncio.Task[None]] = set()
        admission.on_change = self.look

    def refusal(self) -> Refusal | None:
        """Why no guest may enter now; None if one may."""
        if len(self._guests) >= self._most:
            return "in flight"
        return None if self._room(len(self._guests) + 1) else "busy"

    def run(self, work: Coroutine[None, None, None]) -> None:
        """Run a guest. To be called only if there is no `refusal`."""
        task = asyncio.create_task(work)
        self._guests.add(task)
        task.add_done_callback(self._guests.discard)

    def look(self) -> None:
        """Send the guests away if their room is needed."""
        if self._guests and not self._room(len(self._guests)):
            self.clear()

    def clear(self) -> None:
        """Send all guests away."""
        for task in self._guests:
            task.cancel()

    async def stop(self) -> None:
        """Send them away and wait until they are gone."""
        self.clear()
        await asyncio.gather(*self._guests, return_exceptions=True)

    def _room(self, guests: int) -> bool:
        admission = self._admission
        return not admission.waiting and not admission.draining and admission.running + guests <= self._places

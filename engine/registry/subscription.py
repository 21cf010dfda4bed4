"""Changes of versions on their way to a listener: in the registry, and in this server's engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from engine.errors import Overloaded
from engine.registry.manifest import AliasChange, Manifest

MOST_EVENTS = 1000  # that may wait for one listener


@dataclass(frozen=True)
class Published:
    """A version was published."""

    manifest: Manifest


@dataclass(frozen=True)
class AliasChanged:
    """An alias moved or was removed."""

    name: str
    change: AliasChange


@dataclass(frozen=True)
class Deleted:
    """A version was deleted."""

    name: str
    version: str


EngineChange = Literal["loaded", "evicted", "quarantined"]


@dataclass(frozen=True)
class InEngine:
    """A version was loaded into the engine, in so many seconds, or taken out of it, or will never be served there again."""

    change: EngineChange
    manifest: Manifest
    seconds: float = 0.0


Event = Published | AliasChanged | Deleted | InEngine


class Subscription:
    """An async iterator over events. A listener that falls behind gets what is waiting, and then Overloaded."""

    def __init__(self, on_end: Callable[[Subscription], None]) -> None:
        self._on_end = on_end
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._end: Exception | None = None

    def push(self, event: Event) -> None:
        """Hand over an event; with too many waiting the subscription ends instead."""
        if self._end is not None:
            return
        if len(self._events) >= MOST_EVENTS:
            self._finish(Overloaded(len(self._events), "changes wait for this listener"))
            return
        self._events.append(event)
        self._arrived.set()

    def close(self) -> None:
        """End the subscription; whoever waits for the next event sees the end."""
        self._events.clear()
        self._finish(StopAsyncIteration())

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._end is not None:
                raise self._end
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, end: Exception) -> None:
        if self._end is None:
            self._end = end
            self._on_end(self)
        self._arrived.set()

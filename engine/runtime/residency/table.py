"""Who has a slot in the engine, and who makes way for whom.

Knows no engine, no event loop and no clock: `now` is an argument, so that a simulation can drive it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Worth(Protocol):
    """What keeping an adapter is worth: in a server, how often it was asked for of late (registry/worth.py)."""

    def asked(self, key: str, now: float) -> None:
        """A request uses it."""

    def worth(self, key: str, now: float) -> float:
        """Whoever has least makes way."""
        ...


@dataclass(kw_only=True)
class Occupant(ABC):
    """An adapter in its slot, or on its way there; `last_used` is in seconds, on the clock of `now`."""

    in_use: int = 0
    pinned: bool = False
    last_used: float = 0.0

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether requests can use it now."""

    @property
    def evictable(self) -> bool:
        """Whether it may be taken out now."""
        return self.ready and not self.in_use and not self.pinned


T = TypeVar("T", bound=Occupant)


class SlotTable(Generic[T]):
    """`capacity` slots, and one more for an adapter that is loaded ahead. `expected` holds what requests wait for or use."""

    def __init__(self, capacity: int, worth: Worth, expected: Container[str]) -> None:
        self.capacity = capacity
        self.held: dict[str, T] = {}  # by content digest
        self._worth = worth
        self._expected = expected
        self._last: Counter[str] = Counter()

    def asked(self, digest: str, now: float) -> None:
        """A request uses the adapter, wherever it is."""
        self._worth.asked(digest, now)

    def is_ready(self, digest: str) -> bool:
        """Whether the adapter is in its slot."""
        occupant = self.held.get(digest)
        return occupant is not None and occupant.ready

    @contextmanager
    def last(self, digest: str) -> Iterator[None]:
        """For the time of the block, everybody else makes way before the adapter."""
        self._last[digest] += 1
        try:
            yield
        finally:
            self._last[digest] -= 1
            self._last += Counter()  # forget who has none

    def find(self, now: float, *, ahead: bool, under_way: bool) -> tuple[str | None] | None:
        """A slot, with the digest of who has to leave it; None while none may go.

        `ahead`: for an adapter whose requests have yet to get their turn, which nothing that others wait for makes way
        for, and nothing that is to go last. `under_way`: one is being loaded ahead just now, and there is never a second.
        """
        count = len(self.held)
        if ahead and under_way:
            return None
        if count < self.capacity + ahead:
            return (None,)
        idle = [digest for digest, occupant in self.held.items() if occupant.evictable]
        if ahead:
            idle = [digest for digest in idle if digest not in self._expected and digest not in self._last]
        if idle:
            return (min(idle, key=lambda digest: self._merit(digest, now)),)
        return (None,) if count == self.capacity and under_way else None

    def _merit(self, digest: str, now: float) -> tuple[bool, bool, float, float]:
        """Least goes first, of equals the one unused for longest. All slots are alike, and so are copies into them."""
        worth, last_used = self._worth.worth(digest, now), self.held[digest].last_used
        return digest in self._last, digest in self._expected, worth, last_used

"""The adapters in a modelled engine: the server's own decisions about them, and loads that take virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from engine.runtime.residency.table import Occupant, SlotTable, Worth

Later = Callable[[float, Callable[[float], None]], None]  # calls back at a virtual time, with it


@dataclass(eq=False, kw_only=True)
class Loaded(Occupant):
    """An adapter that is in the engine from `ready_at` on."""

    ready_at: float
    there: bool = False

    @property
    def ready(self) -> bool:
        """Whether its load is over."""
        return self.there

    def arrive(self, now: float) -> None:
        """Its load is over."""
        del now
        self.there = True


class Residents:
    """What `Residency` is to a server. `load_s` tells how long an adapter's load takes; digests are adapters' names here.

    Whatever waits for a slot is taken to be in host memory meanwhile, so that it can be loaded ahead.
    """

    claimed: Collection[str] = ()  # nobody pins or promotes

    def __init__(self, capacity: int, worth: Worth, load_s: Callable[[str], float], later: Later) -> None:
        self.capacity = capacity
        self.expected: Counter[str] = Counter()
        self._slots: SlotTable[Loaded] = SlotTable(capacity, worth, self.expected)
        self._load_s = load_s
        self._later = later
        self._ahead: Loaded | None = None

    def is_resident(self, digest: str) -> bool:
        """Whether requests for it can go on without loading it."""
        return self._slots.is_ready(digest)

    def names(self) -> list[str]:
        """What is in."""
        return [name for name, occupant in self._slots.held.items() if occupant.ready]

    def in_use(self) -> dict[str, int]:
        """The requests on each adapter that is in and has any."""
        held = self._slots.held.items()
        return {name: occupant.in_use for name, occupant in held if occupant.in_use and occupant.ready}

    def ready_at(self, adapter: str) -> float | None:
        """When it can be used, now or earlier if it can be already; None if nobody has begun to load it."""
        occupant = self._slots.held.get(adapter)
        return occupant.ready_at if occupant else None

    def victim(self, now: float) -> str | None:
        """Whom a load would evict now; None if nobody."""
        found = self._slots.find(now, ahead=False, under_way=self._loads_ahead)
        return found[0] if found else None

    def expect(self, adapter: str) -> None:
        """A request for it has come."""
        self.expected[adapter] += 1

    def forget(self, adapter: str) -> None:
        """A request for it has ended, or was refused."""
        self.expected[adapter] -= 1
        if not self.expected[adapter]:
            del self.expected[adapter]

    def lease(self, adapter: str, now: float) -> float:
        """Use it, loading it first if need be; returns when it is ready."""
        self._slots.asked(adapter, now)
        occupant = self._slots.held.get(adapter) or self._load(adapter, now)
        if occupant is None:
            raise RuntimeError("admission let in more adapters than there are slots")
        occupant.in_use += 1
        occupant.last_used = now
        return occupant.ready_at

    def release(self, adapter: str, now: float) -> None:
        """A request has let go of it."""
        occupant = self._slots.held[adapter]
        occupant.in_use -= 1
        occupant.last_used = now

    def load_ahead(self, adapter: str, now: float) -> None:
        """It is next to get a slot: have it there by then, if there is room for one more."""
        if adapter not in self._slots.held:
            self._ahead = self._load(adapter, now, ahead=True) or self._ahead

    @property
    def _loads_ahead(self) -> bool:
        return self._ahead is not None and not self._ahead.ready

    def _load(self, adapter: str, now: float, *, ahead: bool = False) -> Loaded | None:
        found = self._slots.find(now, ahead=ahead, under_way=self._loads_ahead)
        if found is None:
            return None
        if found[0]:
            del self._slots.held[found[0]]
        occupant = self._slots.held[adapter] = Loaded(ready_at=now + self._load_s(adapter), last_used=now)
        self._later(occupant.ready_at, occupant.arrive)
        return occupant

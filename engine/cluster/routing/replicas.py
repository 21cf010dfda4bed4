"""What a router knows: of each replica what it last said of itself, and what this router has sent there since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from engine.cluster.routing.rendezvous import Rendezvous

UNKNOWN_RANK = 16  # of an adapter that is resident nowhere: the commonest one


@dataclass(frozen=True)
class Report:
    """What a replica says of itself. `residents` holds versions by adapter name, `in_use` the requests that use or want them.

    `pinned` are references of versions ("support@v2") that it is to keep.
    `places` is how many requests it works on at once, `slots` how many adapters it holds; its `base` is a fingerprint.
    """

    base: str = ""
    places: int = 32
    slots: int = 8
    running: int = 0
    waiting: int = 0
    residents: Mapping[str, frozenset[str]] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    in_use: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    draining: bool = False


class Replica:
    """A replica: its latest report, and how many requests this router has under way there."""

    def __init__(self, id: str, report: Report | None = None) -> None:  # noqa: A002 - it is one
        self.id = id
        self.report = report or Report()
        self.trusted = True  # false while it is known to fail, whatever it says of itself
        self.sent = 0
        self.known = 0  # how many of those the report knew already

    @property
    def usable(self) -> bool:
        """Whether it gets new requests."""
        return self.trusted and not self.report.draining and bool(self.report.base)

    @property
    def active(self) -> int:
        """Requests that run or wait there, those included that the report could not know."""
        return self.report.running + self.report.waiting + max(0, self.sent - self.known)

    @property
    def slots_used(self) -> int:
        """How many adapters requests use now: the others may be evicted."""
        return len(self.report.in_use)

    def holds(self, adapter: str, version: str = "") -> bool:
        """Whether the adapter is in its engine; without a version, whether any version of it is."""
        versions = self.report.residents.get(adapter)
        return versions is not None and (not version or version in versions)


class Group:
    """The usable replicas of one base, and sums over them that every choice needs."""

    def __init__(self, members: Iterable[Replica]) -> None:
        self.members = tuple(members)
        self.ring = Rendezvous({replica.id: replica.report.places for replica in self.members})
        self.places = sum(replica.report.places for replica in self.members)
        self.active = sum(replica.active for replica in self.members)
        self.in_use: Counter[str] = Counter()
        self.ranks: dict[str, int] = {}
        for replica in self.members:
            self.count(replica.report, 1)

    def count(self, report: Report, sign: int) -> None:
        """Add or take away a report's adapters."""
        for adapter, number in report.in_use.items():
            self.in_use[adapter] += sign * number
        self.ranks.update(report.ranks)


class Replicas:
    """The fleet as a router sees it. Every change goes through here, so that the sums stay right."""

    def __init__(self, replicas: Iterable[Replica] = ()) -> None:
        self.by_id: dict[str, Replica] = {replica.id: replica for replica in replicas}
        self._groups: dict[str, Group] = {}
        self._bases: list[str] = []

    def __iter__(self) -> Iterator[Replica]:
        return iter(self.by_id.values())

    def __len__(self) -> int:
        return len(self.by_id)

    def add(self, replica: Replica) -> None:
        """A replica joins."""
        self.by_id[replica.id] = replica
        self._regroup()

    def remove(self, id: str) -> None:  # noqa: A002
        """A replica leaves."""
        self.by_id.pop(id, None)
        self._regroup()

    def trust(self, replica: Replica, trusted: bool) -> None:
        """It fails, or has recovered."""
        if replica.trusted != trusted:
            replica.trusted = trusted
            self._regroup()

    def reported(self, replica: Replica, report: Report, known: int | None = None) -> None:
        """A report came. `known` is how many of this router's requests were there when it was asked for; None: all."""
        old, before, usable = replica.report, replica.active, replica.usable
        replica.report, replica.known = report, replica.sent if known is None else min(known, replica.sent)
        if (old.base, old.places, usable) != (report.base, report.places, replica.usable):
            self._regroup()
        elif group := self._summed(replica):
            group.active += replica.active - before
            group.count(old, -1)
            group.count(report, 1)

    def begin(self, replica: Replica) -> None:
        """A request is sent there."""
        self._send(replica, 1)

    def end(self, replica: Replica) -> None:
        """It has ended."""
        self._send(replica, -1)

    def _send(self, replica: Replica, change: int) -> None:
        before = replica.active
        replica.sent += change
        replica.known = min(replica.known, replica.sent)
        if group := self._summed(replica):
            group.active += replica.active - before

    def _summed(self, replica: Replica) -> Group | None:
        """The sums that it is part of, if there are any: requests of one that has left may end long after."""
        listed = self.by_id.get(replica.id) is replica
        return self._groups.get(replica.report.base) if listed and replica.usable else None

    def group(self, base: str) -> Group:
        """The usable replicas of a base."""
        if base not in self._groups:
            self._groups[base] = Group(one for one in self if one.report.base == base and one.usable)
        return self._groups[base]

    def bases(self) -> list[str]:
        """The bases that usable replicas serve, the one with most replicas first; all routers order them alike."""
        if not self._bases:
            counted = Counter(replica.report.base for replica in self if replica.usable)
            self._bases = sorted(counted, key=lambda base: (-counted[base], base))
        return self._bases

    def _regroup(self) -> None:
        """Who is usable, or for which base, has changed: sum up again when somebody asks."""
        self._groups.clear()
        self._bases = []

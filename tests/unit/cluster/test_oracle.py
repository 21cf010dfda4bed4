"""The simulation's oracle: it knows what comes, and chooses by it."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

from engine.cluster.routing import Replica, Replicas
from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.oracle import Future, Oracle
from engine.cluster.simulation.replica import Job, VirtualReplica

MODEL = EngineModel("plain", 0.01, 0.001, 100, places=4, slots=2, load_s=0.5, load_rank_s=0.0, source="")


def job(adapter: str, arrived: float = 0.0, tokens: int = 10) -> Job:
    """A request."""
    return Job(arrived, adapter, 16, 100, tokens)


class Fleet:
    """Engines, r0 ..., before an oracle that knows `future`."""

    def __init__(self, count: int, *future: Job) -> None:
        self.future = Future(future)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        names = [f"r{number}" for number in range(count)]
        self.engines = {name: VirtualReplica(name, MODEL, self.future, self._later, lambda _: None) for name in names}
        self._view = Replicas(Replica(name, engine.report()) for name, engine in self.engines.items())
        self._oracle = Oracle(MODEL, self.engines, self.future)

    def _later(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def ask(self, name: str, one: Job) -> None:
        """A request at this engine."""
        self.until(one.arrived)
        self.engines[name].arrive(one, one.arrived)

    def until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            now, _, event = heapq.heappop(self._events)
            event(now)

    def choice(self, one: Job) -> str:
        """Where the oracle would send a request."""
        self.until(one.arrived)
        return self._oracle.choose(one, self._view, one.arrived).id


def test_the_future() -> None:
    """It knows when an adapter is asked for next, and that what is asked for last makes way."""
    future = Future([job("a", 1.0), job("b", 2.0), job("a", 5.0)])
    assert [future.next_use("a", now) for now in (0.0, 1.0, 5.0)] == [1.0, 5.0, math.inf]
    future = Future([job("a", 1.0), job("b", 2.0), job("a", 5.0)])
    assert future.worth("never", 0.0) < future.worth("b", 0.0) < future.worth("a", 0.0)


def test_engines_evict_what_is_needed_last() -> None:
    """A server would keep what it was asked for often; who knows that it is not wanted any more does not."""
    fleet = Fleet(
        1, *(job("often", at) for at in (0.0, 2.0, 4.0)), job("soon", 6.0), job("new", 8.0), job("soon", 12.0)
    )
    for at, adapter in ((0.0, "often"), (2.0, "often"), (4.0, "often"), (6.0, "soon"), (8.0, "new")):
        fleet.ask("r0", job(adapter, at))
    fleet.until(10.0)
    assert sorted(fleet.engines["r0"].residents.names()) == ["new", "soon"]


def test_it_spares_what_is_asked_for_soon() -> None:
    """Of two engines alike it loads where the adapter that makes way is not missed."""
    later = [job("new", 10.0), job("a", 11.0), job("b", 11.0), job("end", 100.0)]
    for busy, idle in (("r0", "r1"), ("r1", "r0")):
        fleet = Fleet(2, *(job(name) for name in "abcd"), *later)
        for name, adapters in ((busy, "ab"), (idle, "cd")):
            for adapter in adapters:
                fleet.ask(name, job(adapter))
        assert fleet.choice(job("new", 10.0)) == idle


def test_it_sees_loads_on_their_way() -> None:
    """An adapter that is nearly there is nearer than one that would have to be loaded, whatever the latest report says."""
    fleet = Fleet(2, job("a"), job("end", 100.0))
    fleet.ask("r1", job("a"))
    assert fleet.choice(job("a", 0.4)) == "r1"


def test_it_sees_who_is_still_loading() -> None:
    """An engine whose slots all wait for their loads has none left, empty as its batch is."""
    fleet = Fleet(2, *(job(name) for name in "abc"), job("end", 100.0))
    for adapter in "ab":
        fleet.ask("r0", job(adapter, tokens=100))
    assert fleet.choice(job("c", 0.01)) == "r1"
    assert [adapter for _, adapter in fleet.engines["r0"].ends(0.01)] == ["a", "b"]


def test_it_counts_who_waits_for_a_slot_already() -> None:
    """The slot that is free first is somebody else's: it goes where the second one is nearer than there."""
    fleet = Fleet(2, *(job(name) for name in "abcdef"), job("end", 100.0))
    for name, adapter, tokens in (("r0", "a", 50), ("r0", "b", 2000), ("r1", "d", 100), ("r1", "e", 2000)):
        fleet.ask(name, job(adapter, tokens=tokens))
    assert fleet.choice(job("f", 0.6)) == "r0"
    fleet.ask("r0", job("c", 0.6))
    assert fleet.choice(job("f", 0.6)) == "r1"


def test_it_knows_how_long_answers_will_be() -> None:
    """Of two full engines it takes the one whose next answer ends first."""
    fleet = Fleet(2, job("end", 100.0))
    for number in range(4):
        fleet.ask("r0", job("", tokens=1000 + number))
        fleet.ask("r1", job("", tokens=50 if number == 3 else 2000))
    assert fleet.choice(job("", 0.1)) == "r1"


def test_it_spreads_favourites_before_they_are_in_each_others_way() -> None:
    """A second copy is worth its load when many will ask for it: who does not know stays with the first."""
    for followers, wanted in ((0, "r0"), (300, "r1")):
        coming = [job("hot", 1.0 + number / 10_000) for number in range(followers)]
        fleet = Fleet(2, *(job("hot") for _ in range(3)), *coming, job("end", 100.0))
        for _ in range(3):
            fleet.ask("r0", job("hot", tokens=1000))
        assert fleet.choice(job("hot", 1.0)) == wanted

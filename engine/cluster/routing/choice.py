"""The choice of a replica for one request.

Each adapter has an order of preference among the replicas (rendezvous hashing). Its candidates are the first ones of that
order, as many as its traffic needs, and a few of the next that hold it already; a candidate whose load is far above the
mean is passed over, and the next one of the order takes its place (bounded loads: Mirrokni, Thorup & Zadimoghaddam, SODA
2018). Of the candidates the one with the least estimated time to first token gets the request. If that is more than two
loads away, a fresh copy is cheaper, so the first replicas of the order that are not overloaded compete too. All that this
needs is in the replicas' reports, so several routers choose alike without talking to each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.cluster.routing.costs import Costs, work_of
from engine.cluster.routing.replicas import UNKNOWN_RANK, Group, Replica, Replicas

BOUND = 1.25  # times the mean load: a replica above it is overloaded
_ROOM = 0.5  # a replica that uses less than this share of its places is not overloaded, whatever the mean
_SHARE = 0.5  # of a replica's places that one adapter may use before it is spread over one more
_HOLDERS = 4  # replicas that are looked at because they hold the adapter, beside the preferred ones
_LOADS = 2  # what one more copy costs: its own load, and some day that of the adapter which it displaces
_PREFIX_COPIES = 2  # replicas that are looked at for a prompt to the base model


@dataclass(frozen=True)
class Ask:
    """What is known of a request: its adapter ("" for the base model) and version ("" if an alias decides).

    `prefix` stands for the beginning of its prompt: requests that share it share a prefix cache. `remaining_s` is the time
    until its deadline.
    """

    adapter: str = ""
    version: str = ""
    prefix: str = ""
    remaining_s: float = math.inf

    @property
    def key(self) -> str:
        """What decides the order of preference: the adapter, of whichever version, or else the prompt's beginning."""
        return f"adapter {self.adapter}" if self.adapter else f"prefix {self.prefix}"


class Chooser:
    """Chooses among `replicas`, by `costs` (which may be replaced as their times are learned)."""

    def __init__(self, replicas: Replicas, costs: Costs | None = None) -> None:
        self.replicas = replicas
        self.costs = costs or Costs()

    def choose(self, ask: Ask, base: str, excluded: Collection[str] = ()) -> Replica | None:
        """The replica of `base` that should answer; None when there is none but `excluded` ones."""
        group = self.replicas.group(base)
        allowed = [one for one in group.members if one.id not in excluded] if excluded else group.members
        if not allowed:
            return None
        rank = group.ranks.get(ask.adapter, UNKNOWN_RANK)
        best = self._cheapest(ask, self._candidates(ask, group, excluded), rank)
        if ask.adapter and self.cost(ask, best, rank) > _LOADS * self.costs.load(rank):
            best = self._cheapest(ask, [best, *self._well(ask, group, excluded)], rank)
        if self.cost(ask, best, rank) > ask.remaining_s:  # too late there: take whoever is fastest, prefer or not
            best = min(allowed, key=lambda one: self.cost(ask, one, rank))
        return best

    def owners(self, adapter: str, base: str) -> list[Replica]:
        """The replicas that an adapter's traffic goes to by preference, two at least: who should have it before it comes."""
        group = self.replicas.group(base)
        first = group.ring.first(Ask(adapter).key)[: max(2, _copies(adapter, group))]
        return [self.replicas.by_id[name] for name in first]

    def cost(self, ask: Ask, replica: Replica, rank: int = UNKNOWN_RANK) -> float:
        """The estimated time to first token there, in seconds."""
        if not ask.adapter:
            return self.costs.queue(replica)
        return self.costs.queue(replica, work_of(rank)) + self.costs.adapter(replica, ask.adapter, ask.version, rank)

    def _candidates(self, ask: Ask, group: Group, excluded: Collection[str]) -> list[Replica]:
        """The preferred replicas that are not overloaded, and a few that hold the adapter; never none."""
        wanted = _copies(ask.adapter, group) if ask.adapter else _PREFIX_COPIES
        found: list[Replica] = []
        holders = 0
        for replica in self._well(ask, group, excluded):
            if len(found) - holders < wanted:
                found.append(replica)
            elif holders < _HOLDERS and ask.adapter and replica.holds(ask.adapter, ask.version):
                found.append(replica)
                holders += 1
        return found or self._from_all(ask, group, excluded)

    def _well(self, ask: Ask, group: Group, excluded: Collection[str]) -> list[Replica]:
        """The first of the order that are not overloaded."""
        first = (self.replicas.by_id[name] for name in group.ring.first(ask.key) if name not in excluded)
        return [one for one in first if not _overloaded(one, group)]

    def _from_all(self, ask: Ask, group: Group, excluded: Collection[str]) -> list[Replica]:
        """Where all of the first are overloaded: the next one that is not, or all."""
        rest = [one for name in group.ring.order(ask.key) if (one := self.replicas.by_id[name]).id not in excluded]
        return [one for one in rest if not _overloaded(one, group)][:1] or rest

    def _cheapest(self, ask: Ask, candidates: Sequence[Replica], rank: int) -> Replica:
        """The candidate with the least cost; the first of those that cost the same."""
        if not ask.adapter:  # the first one of the order has the prefix, unless it had to be passed over
            first = candidates[0]
            return min(candidates, key=lambda one: self.cost(ask, one) + (one is not first) * self.costs.prefill_s)
        return min(candidates, key=lambda one: self.cost(ask, one, rank))


def _copies(adapter: str, group: Group) -> int:
    """Over how many replicas an adapter's traffic is spread: so many that it uses half of each one's places at most."""
    return max(1, math.ceil(group.in_use[adapter] * len(group.members) / (_SHARE * max(1, group.places))))


def _overloaded(replica: Replica, group: Group) -> bool:
    """Whether its load is far above the mean, by its share of all places, and it is half full at least."""
    places = replica.report.places
    fair = BOUND * (group.active + 1) * places / max(1, group.places)
    return replica.active >= max(math.ceil(fair), _ROOM * places)

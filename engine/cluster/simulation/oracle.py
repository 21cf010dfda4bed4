"""What nobody can beat, or nearly so: a choice that knows the future, and a floor under every choice."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.cluster.routing import Replica, Replicas
from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.replica import Job, VirtualReplica


class Future:
    """When each adapter will be asked for, as the trace says. As the `Worth` of residency it is Bélády's rule (1966)."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.end = jobs[-1].arrived
        self.ranks = {job.adapter: job.rank for job in jobs}
        self._times: defaultdict[str, list[float]] = defaultdict(list)
        for job in jobs:
            self._times[job.adapter].append(job.arrived)

    def next_use(self, adapter: str, now: float) -> float:
        """When it is asked for next, in virtual seconds; infinity if never again."""
        times = self._times[adapter]
        at = bisect_right(times, now)
        return times[at] if at < len(times) else math.inf

    def coming(self, adapter: str, now: float, until: float) -> int:
        """How many requests for it come between two times."""
        times = self._times[adapter]
        return bisect_right(times, until) - bisect_right(times, now)

    def asked(self, key: str, now: float) -> None:
        """What was asked for says nothing that it does not know."""

    def worth(self, key: str, now: float) -> float:
        """What is needed last makes way."""
        return -self.next_use(key, now)


@dataclass
class _Outlook:
    """What a replica will be like, as of its `changes`: when it has a place, when a slot, and whom a load would evict."""

    changes: int
    place_at: float
    slot_at: float
    victim: str | None


class Oracle:
    """An upper bound that no router can reach, because it knows what no router can know.

    It sees every engine as it is at this moment, not as of its latest report, with the loads that are on their way; it knows
    how long each answer will be, so when a place and a slot come free; and it knows all requests to come. For each request
    it takes the least sum of three costs: the wait for place, slot and adapter there; the reload of the adapter that makes
    way, which counts the more the sooner that one is asked for again; and the slower steps of a fuller batch, for this
    request and for all that will come for its adapter while its answer runs, so that favourites get their copies in time.
    Its engines evict by the future too (`Future`). It loads nothing that nobody has asked for, as no router does.

    It decides request by request, so it is no proof of the best possible; `floor` is a proof, but one that nobody reaches.
    """

    def __init__(self, model: EngineModel, engines: Mapping[str, VirtualReplica], future: Future) -> None:
        self._model = model
        self._engines = engines
        self._future = future
        self._outlooks: dict[VirtualReplica, _Outlook] = {}

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """The least true cost."""
        model = self._model
        followers = self._future.coming(job.adapter, now, now + job.tokens * model.step(model.places))
        row_s = model.prefill(job.prompt_tokens + job.done) * model.step_row_s * (1 + followers)
        members = replicas.group("base").members
        return min(members, key=lambda one: self._cost(job, self._engines[one.id], row_s, now))

    def _cost(self, job: Job, engine: VirtualReplica, row_s: float, now: float) -> float:
        outlook = self._outlooks.get(engine)
        if outlook is None or outlook.changes != engine.changes:
            outlook = self._outlooks[engine] = self._look(engine, now)
        wait = max(0.0, outlook.place_at - now)
        if job.adapter:
            ready_at = engine.residents.ready_at(job.adapter)
            if not engine.has_slot(job.adapter):
                wait = max(wait, outlook.slot_at - now)
            if ready_at is None:
                wait += self._model.load(job.rank) + self._reload(outlook.victim, now)
            else:
                wait = max(wait, ready_at - now)
        return wait + row_s * engine.active

    def _reload(self, victim: str | None, now: float) -> float:
        """What evicting it will cost, less the later it is asked for again."""
        if victim is None:
            return 0.0
        pause = self._future.next_use(victim, now) - now
        return self._model.load(self._future.ranks[victim]) * max(0.0, 1 - pause / max(1e-9, self._future.end - now))

    def _look(self, engine: VirtualReplica, now: float) -> _Outlook:
        model, residents = self._model, engine.residents
        waiting = engine.active - model.places  # above zero: so many before a request that comes now
        place_at = slot_at = now
        running = engine.adapters
        if waiting >= 0 or running >= model.slots:
            ends = engine.ends(now)
            if waiting >= 0:
                place_at = ends[min(waiting, len(ends) - 1)][0]
            if running >= model.slots:
                free_at = sorted({adapter: at for at, adapter in ends if adapter}.values())  # by the latest of each
                slot_at = free_at[min(engine.waiting_adapters, len(free_at) - 1)]
        return _Outlook(engine.changes, place_at, slot_at, residents.victim(now))


def floor(jobs: Iterable[Job], model: EngineModel) -> np.ndarray:
    """Seconds to first token that no choice of replicas goes below, of each request.

    A prompt takes its steps in a batch of its own, and an adapter's first request loads it: its second one might have been
    spared that by a fleet with room for everything.
    """
    seen = {""}
    least = []
    for job in jobs:
        load = 0.0 if job.adapter in seen else model.load(job.rank)
        seen.add(job.adapter)
        least.append(load + model.prefill(job.prompt_tokens) * model.step(1))
    return np.array(least)

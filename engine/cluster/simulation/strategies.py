"""Ways to choose a replica: the others' known ones, and ours."""

from __future__ import annotations

import random
from typing import Protocol

from engine.cluster.routing import Ask, Chooser, Costs, Replica, Replicas
from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.replica import Job

_ANSWER = 250  # tokens: about as long as the traffic's


class Strategy(Protocol):
    """One router's way. `replicas` is what it knows, from reports that are some tenths of a second old."""

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """The replica for a request."""
        ...


class Random:
    """Any."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """Any."""
        del job, now
        return self._random.choice(replicas.group("base").members)


class LeastLoaded:
    """Whoever has the fewest requests by the latest report and what was sent since."""

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """The least busy one."""
        del job, now
        return min(replicas.group("base").members, key=lambda one: one.active)


class ConsistentHashing:
    """Each adapter at one replica, whatever its load; base requests in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """The adapter's own one."""
        del now
        self._turn += 1
        group = replicas.group("base")
        return replicas.by_id[group.ring.first(job.adapter or f"turn {self._turn}")[0]]


class PowerOfTwo:
    """Ray Serve's multiplexed router: of two random replicas that hold the model the less busy one.

    If none holds it, or each that does has as many requests as places (Serve's max_ongoing_requests), it is two of all.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """The less busy of two."""
        del now
        members = replicas.group("base").members
        holders = [one for one in members if job.adapter and one.holds(job.adapter) and one.active < one.report.places]
        holders = holders or list(members)
        return min(self._random.choices(holders, k=2), key=lambda one: one.active)


class Ours:
    """The router's own code."""

    def __init__(self, model: EngineModel) -> None:
        self._costs = costs(model)
        self._chooser: Chooser | None = None

    def choose(self, job: Job, replicas: Replicas, now: float) -> Replica:
        """As the router would."""
        del now
        if self._chooser is None or self._chooser.replicas is not replicas:
            self._chooser = Chooser(replicas, self._costs)
        prefix = "" if job.adapter else str(job.prompt_tokens)
        chosen = self._chooser.choose(Ask(job.adapter, "v1" if job.adapter else "", prefix), "base")
        if chosen is None:
            raise RuntimeError("there is no replica left")
        return chosen


def costs(model: EngineModel) -> Costs:
    """The times that the choice goes by, for an engine of this kind."""
    return Costs(
        hold_s=_ANSWER * model.step(model.places),
        step_s=model.step(model.places) - model.step(1),
        load_s=model.load_s,
        load_rank_s=model.load_rank_s,
        prefill_s=model.step(model.places),
    )

"""One simulation: the events in their order, and what came of them."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.cluster.routing import Replica, Replicas
from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.movement import Movement, movement
from engine.cluster.simulation.oracle import Future, Oracle, floor
from engine.cluster.simulation.replica import Job, VirtualReplica
from engine.cluster.simulation.strategies import ConsistentHashing, LeastLoaded, Ours, PowerOfTwo, Random, Strategy
from engine.cluster.simulation.traffic import Traffic, jobs
from engine.registry.worth import Rates

REPORT_S = 0.25  # between reports, as routers ask for them
GOOD_TTFT_S = 1.0  # an answer whose first token takes longer is none, for goodput
DEAD_S = 30.0  # until an empty engine takes a dead one's place
STRATEGIES = ("random", "least-loaded", "consistent-hashing", "power-of-two", "ours", "oracle")


@dataclass(frozen=True)
class Result:
    """What came of the requests after the first fifth, which fills the engines. Times are in seconds.

    `floor_p99_s` is what no choice could have brought `ttft_p99_s` below. `hit_rate`: requests whose adapter was loaded
    where they came; `goodput`: answers with a first token within a second, per replica and second. `movement` is None for the
    oracle, which places nothing.
    """

    strategy: str
    replicas: int
    load: float
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    floor_p99_s: float
    hit_rate: float
    goodput: float
    movement: Movement | None
    refused: int
    lost: int
    failovers: int


class Simulation:
    """A fleet of `replicas` engines behind `routers` routers; `deaths` of them die in turn, and come back empty.

    Raises ValueError when no engine would be left.
    """

    def __init__(
        self, strategy: str, model: EngineModel, replicas: int, traffic: Traffic, routers: int = 2, deaths: int = 0
    ) -> None:
        if deaths >= replicas:
            raise ValueError(f"{deaths} deaths leave none of {replicas} replicas")
        self._name = strategy
        self._model = model
        self._traffic = traffic
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._jobs = list(jobs(traffic, model, replicas, routers))
        self._future = Future(self._jobs) if strategy == "oracle" else None
        self.engines = {f"r{number}": self._engine(f"r{number}") for number in range(replicas)}
        self._views = [
            Replicas(Replica(name, engine.report()) for name, engine in self.engines.items()) for _ in range(routers)
        ]
        self._routers = [self._strategy(number) for number in range(routers)]
        self._dying = random.Random(traffic.seed).sample(sorted(self.engines), deaths)  # noqa: S311
        self._movement: Movement | None = None

    def run(self, on_progress: Callable[[float], None] | None = None) -> Result:
        """Play all of it; `on_progress` hears the share that is done."""
        end = self._jobs[-1].arrived
        self._later(self._jobs[0].arrived, lambda now: self._arrive(0, now))
        for number, name in enumerate(self.engines):
            self._later(REPORT_S * number / len(self.engines), lambda now, name=name: self._report(name, now, end))  # type: ignore[misc]
        for number, name in enumerate(self._dying, 1):
            self._later(end * number / (len(self._dying) + 1), lambda now, name=name: self._die(name, now))  # type: ignore[misc]
        self._later(end, self._measure)
        played = 0
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
            played += 1
            if on_progress and played % 10_000 == 0:
                on_progress(min(1.0, now / end))
        return self._result()

    def _later(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def _arrive(self, number: int, now: float) -> None:
        if number + 1 < len(self._jobs):
            self._later(self._jobs[number + 1].arrived, lambda at: self._arrive(number + 1, at))
        self._send(self._jobs[number], now)

    def _send(self, job: Job, now: float) -> None:
        view = self._views[job.router]
        chosen = self._routers[job.router].choose(job, view, now)
        engine = self.engines[chosen.id]
        view.begin(chosen)
        engine.arrive(job, now)

    def _end(self, job: Job) -> None:
        view = self._views[job.router]
        view.end(view.by_id[job.replica])

    def _report(self, name: str, now: float, end: float) -> None:
        engine = self.engines[name]
        if engine.alive:
            report = engine.report()
            for view in self._views:
                view.reported(view.by_id[name], report)
        if now < end:
            self._later(now + REPORT_S, lambda at: self._report(name, at, end))

    def _die(self, name: str, now: float) -> None:
        """Its requests go on elsewhere at once."""
        orphans = self.engines[name].die(now)
        for view in self._views:
            view.trust(view.by_id[name], trusted=False)
        for job in orphans:
            job.failovers += 1
            self._views[job.router].end(self._views[job.router].by_id[name])
            self._send(job, now)
        self._later(now + DEAD_S, lambda _: self._come_back(name))

    def _come_back(self, name: str) -> None:
        self.engines[name] = self._engine(name)
        for view in self._views:
            view.reported(view.by_id[name], self.engines[name].report())
            view.trust(view.by_id[name], trusted=True)

    def _measure(self, now: float) -> None:
        """At the end of the arrivals, when all is as full as it gets."""
        if self._name != "oracle":
            reports = {name: engine.report() for name, engine in self.engines.items() if engine.alive}
            self._movement = movement(self._strategy(len(self._routers)), reports, now)

    def _engine(self, name: str) -> VirtualReplica:
        return VirtualReplica(name, self._model, self._future or Rates(), self._later, self._end)

    def _strategy(self, seed: int) -> Strategy:
        if self._future:
            return Oracle(self._model, self.engines, self._future)
        made: dict[str, Callable[[], Strategy]] = {
            "random": lambda: Random(seed),
            "least-loaded": LeastLoaded,
            "consistent-hashing": ConsistentHashing,
            "power-of-two": lambda: PowerOfTwo(seed),
            "ours": lambda: Ours(self._model),
        }
        return made[self._name]()

    def _result(self) -> Result:
        cold = len(self._jobs) // 5
        warm = self._jobs[cold:]
        ttft = np.array([job.first - job.arrived for job in warm if job.first >= 0])
        asked = [job for job in warm if job.adapter]
        seconds = warm[-1].arrived - warm[0].arrived
        return Result(
            strategy=self._name,
            replicas=len(self.engines),
            load=self._traffic.load,
            requests=len(warm),
            ttft_p50_s=float(np.percentile(ttft, 50)),
            ttft_p99_s=float(np.percentile(ttft, 99)),
            floor_p99_s=float(np.percentile(floor(self._jobs, self._model)[cold:], 99)),
            hit_rate=sum(job.hit for job in asked) / max(1, len(asked)),
            goodput=float((ttft <= GOOD_TTFT_S).sum()) / seconds / len(self.engines),
            movement=self._movement,
            refused=sum(job.refused for job in self._jobs),
            lost=sum(job.finished < 0 and not job.refused for job in self._jobs),
            failovers=sum(job.failovers for job in self._jobs),
        )

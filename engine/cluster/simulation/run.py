"""One simulation: the events in their order, and what came of them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.cluster.routing import Replica, Replicas
from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.replica import Job, VirtualReplica
from engine.cluster.simulation.strategies import (
    ConsistentHashing,
    LeastLoaded,
    Oracle,
    Ours,
    PowerOfTwo,
    Random,
    Strategy,
)
from engine.cluster.simulation.traffic import Traffic, jobs

REPORT_S = 0.25  # between reports, as routers ask for them
GOOD_TTFT_S = 1.0  # an answer whose first token takes longer is none, for goodput
STRATEGIES = ("random", "least-loaded", "consistent-hashing", "power-of-two", "ours", "oracle")


@dataclass(frozen=True)
class Result:
    """Times in seconds. `hit_rate`: requests that found their adapter loaded; `goodput` is per replica and second."""

    strategy: str
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    hit_rate: float
    goodput: float
    refused: int
    lost: int
    failovers: int


class Simulation:
    """A fleet of `replicas` engines behind `routers` routers; `deaths` of them die in turn, and come back empty."""

    def __init__(
        self, strategy: str, model: EngineModel, replicas: int, traffic: Traffic, routers: int = 2, deaths: int = 0
    ) -> None:
        self._name = strategy
        self._model = model
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ended: list[Job] = []
        self.engines = {f"r{number}": self._engine(f"r{number}") for number in range(replicas)}
        self._views = [
            Replicas(Replica(name, engine.report()) for name, engine in self.engines.items()) for _ in range(routers)
        ]
        self._routers = [self._strategy(strategy, number) for number in range(routers)]
        self._jobs = list(jobs(traffic, model, replicas, routers))
        self._deaths = deaths

    def run(self, on_progress: Callable[[float], None] | None = None) -> Result:
        """Play all of it; `on_progress` hears the share that is done."""
        for job in self._jobs:
            self._later(job.arrived, lambda now, job=job: self._send(job, now))  # type: ignore[misc]
        end = self._jobs[-1].arrived
        for number, name in enumerate(self.engines):
            self._later(REPORT_S * number / len(self.engines), lambda now, name=name: self._report(name, now, end))  # type: ignore[misc]
        for number in range(self._deaths):
            name = f"r{(7 * number) % len(self.engines)}"
            self._later(end * (number + 1) / (self._deaths + 1), lambda now, name=name: self._die(name, now))  # type: ignore[misc]
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

    def _send(self, job: Job, now: float) -> None:
        view = self._views[job.router]
        chosen = self._routers[job.router].choose(job, view, now)
        engine = self.engines[chosen.id]
        view.begin(chosen)
        engine.arrive(job, now)

    def _end(self, job: Job, now: float) -> None:
        del now
        view = self._views[job.router]
        if job.replica in view.by_id:
            view.end(view.by_id[job.replica])
        self._ended.append(job)

    def _report(self, name: str, now: float, end: float) -> None:
        engine = self.engines[name]
        if engine.alive:
            report = engine.report()
            for view in self._views:
                view.reported(view.by_id[name], report)
        if now < end:
            self._later(now + REPORT_S, lambda at: self._report(name, at, end))

    def _die(self, name: str, now: float) -> None:
        """Its requests go on elsewhere at once; an empty engine takes its place half a minute later."""
        orphans = self.engines[name].die(now)
        for view in self._views:
            view.trust(view.by_id[name], trusted=False)
        for job in orphans:
            job.failovers += 1
            self._views[job.router].end(self._views[job.router].by_id[name])
            self._send(job, now)
        self._later(now + 30, lambda at: self._come_back(name, at))

    def _come_back(self, name: str, now: float) -> None:
        del now
        self.engines[name] = self._engine(name)
        for view in self._views:
            view.reported(view.by_id[name], self.engines[name].report())
            view.trust(view.by_id[name], trusted=True)

    def _engine(self, name: str) -> VirtualReplica:
        return VirtualReplica(name, self._model, self._later, self._end)

    def _strategy(self, name: str, seed: int) -> Strategy:
        made: dict[str, Callable[[], Strategy]] = {
            "random": lambda: Random(seed),
            "least-loaded": LeastLoaded,
            "consistent-hashing": ConsistentHashing,
            "power-of-two": lambda: PowerOfTwo(seed),
            "ours": lambda: Ours(self._model),
            "oracle": lambda: Oracle(self._model, self.engines),
        }
        return made[name]()

    def _result(self) -> Result:
        warm = self._jobs[len(self._jobs) // 5 :]  # engines begin empty: the first fifth fills them
        answered = [job for job in warm if job.first >= 0]
        ttft = np.array([job.first - job.arrived for job in answered])
        asked = [job for job in warm if job.adapter]
        seconds = warm[-1].arrived - warm[0].arrived
        return Result(
            strategy=self._name,
            requests=len(warm),
            ttft_p50_s=float(np.percentile(ttft, 50)),
            ttft_p99_s=float(np.percentile(ttft, 99)),
            hit_rate=sum(job.hit for job in asked) / max(1, len(asked)),
            goodput=float((ttft <= GOOD_TTFT_S).sum()) / seconds / len(self.engines),
            refused=sum(job.refused for job in self._jobs),
            lost=sum(job.finished < 0 and not job.refused for job in self._jobs),
            failovers=sum(job.failovers for job in self._jobs),
        )

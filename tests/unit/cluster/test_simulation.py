"""The simulation: its engines keep time, nothing is lost in it, and the router's way is what it promises."""

from __future__ import annotations

import heapq

import pytest

from engine.cluster.simulation.engine import MODELS, EngineModel
from engine.cluster.simulation.run import Simulation
from engine.cluster.simulation.strategies import moved
from engine.cluster.simulation.traffic import Traffic, jobs
from tests.unit.cli.calls import call

PLAIN = EngineModel("plain", 0.01, 0.001, 100, places=4, slots=2, load_s=0.5, load_rank_s=0.0, source="")


def simulated(strategy: str, replicas: int = 8, deaths: int = 0, model: EngineModel = MODELS["h100"], **traffic: float):  # type: ignore[no-untyped-def]
    """A small simulation's result."""
    return Simulation(
        strategy,
        model,
        replicas,
        Traffic(**({"requests": 2000, "adapters": 500, "load": 0.8} | traffic)),
        deaths=deaths,
    ).run()  # type: ignore[arg-type]


def test_an_engine_keeps_time() -> None:
    """One request alone takes its prefill and its tokens at the pace of a batch of one; its adapter's load comes before."""
    traffic = Traffic(requests=1, adapters=1, base_share=0.0, prompt=150, answer=10)
    simulation = Simulation("ours", PLAIN, 1, traffic)
    job = simulation._jobs[0]
    simulation._later(job.arrived, lambda now: simulation._send(job, now))
    while simulation._events:
        now, _, event = heapq.heappop(simulation._events)
        event(now)
    prefill = -(-job.prompt_tokens // 100)
    assert job.first - job.arrived == pytest.approx(0.5 + prefill * 0.011)
    assert job.finished - job.first == pytest.approx((job.tokens - 1) * 0.011)
    assert not job.hit


def test_traffic_is_what_was_asked_for() -> None:
    """The same seed makes the same requests; popularity is skewed, the rate is right."""
    traffic = Traffic(requests=20_000, adapters=100, zipf=1.0)
    made = list(jobs(traffic, MODELS["h100"], 4, 2))
    assert [job.adapter for job in made] == [job.adapter for job in jobs(traffic, MODELS["h100"], 4, 2)]
    assert len(made) / made[-1].arrived == pytest.approx(traffic.rate(MODELS["h100"], 4), rel=0.05)
    counts = sorted((sum(job.adapter == f"a{n}" for job in made) for n in range(100)), reverse=True)
    assert counts[0] > 5 * counts[20] > 0


def test_ours_beats_random_and_comes_near_the_oracle() -> None:
    """At high load: a fraction of random's p99, close to what an oracle reaches, and more hits than ways without affinity."""
    random, ours, oracle = (simulated(strategy) for strategy in ("random", "ours", "oracle"))
    assert ours.ttft_p99_s < random.ttft_p99_s / 2
    assert ours.ttft_p99_s < 1.1 * oracle.ttft_p99_s
    assert ours.hit_rate > 1.3 * random.hit_rate


@pytest.mark.parametrize("strategy", ["random", "least-loaded", "consistent-hashing", "power-of-two", "ours", "oracle"])
def test_nothing_is_lost(strategy: str) -> None:
    """Every request ends, also when engines die on the way and the rate swings."""
    result = simulated(strategy, deaths=3, requests=600, adapters=60, burst=3)
    assert result.lost == 0
    assert result.failovers > 0


def test_one_more_replica_moves_little() -> None:
    """At most twice its ideal share, at any size."""
    for replicas in (2, 16, 64):
        assert moved(replicas, 2000) < 2


def test_command() -> None:
    """`loraplex simulate` prints a row for each way, and refuses what it does not know."""
    done = call("simulate", "--requests", "300", "--adapters", "20", "--replicas", "3", "--strategy", "ours")
    assert done.code == 0
    assert "ours" in done.out
    assert "One more replica moves" in done.out
    wrong = call("simulate", "--strategy", "luck")
    assert wrong.code == 1
    assert "choose from random" in wrong.err

"""The simulation: its engines keep time, nothing is lost in it, and the router's way is what it promises."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.cluster.simulation.engine import MODELS, EngineModel
from engine.cluster.simulation.oracle import floor
from engine.cluster.simulation.replica import Job, VirtualReplica
from engine.cluster.simulation.run import STRATEGIES, Simulation
from engine.cluster.simulation.traffic import Traffic, jobs
from engine.registry.worth import Rates
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


class Alone:
    """One replica and its events."""

    def __init__(self, model: EngineModel = PLAIN) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self.replica = VirtualReplica("r0", model, Rates(), self.later, lambda _: None)

    def later(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def ask(self, adapter: str, at: float, tokens: int = 10) -> Job:
        """A request for it, when all until then has happened."""
        self.until(at)
        job = Job(at, adapter, 16, 100, tokens)
        self.replica.arrive(job, at)
        return job

    def until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self.now, _, event = heapq.heappop(self._events)
            event(self.now)
        self.now = end


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


def test_times_are_those_that_are_published() -> None:
    """The models say what their sources say: README and docs/residency.md, the H100's data sheet."""
    cpu, h100 = MODELS["cpu"], MODELS["h100"]
    assert cpu.step(16) == pytest.approx(0.050, rel=0.02)
    assert cpu.load(16) == pytest.approx(0.025 + 0.013, rel=0.1)
    assert cpu.prefill(300) * cpu.step(16) == pytest.approx(300 * 0.0015, rel=0.15)
    weights_s = 16e9 / 3.35e12
    assert 1.3 < h100.step_s / weights_s < 1.7
    assert h100.chunk * 16e9 / (989e12 / 2) == pytest.approx(h100.step(16), rel=0.1)
    assert h100.load(16) == pytest.approx(0.03 + 84e6 / 1e9, rel=0.1)


def test_the_servers_residency_decides() -> None:
    """What is asked for least makes way, not what was used longest ago: a server would evict the same."""
    alone = Alone()
    for at in (0.0, 1.0, 2.0):
        alone.ask("often", at)
    alone.ask("once", 3.0)
    alone.ask("new", 4.0)
    alone.until(5.0)
    assert sorted(alone.replica.residents.names()) == ["new", "often"]
    assert alone.ask("often", 5.0).hit
    assert not alone.ask("once", 5.1).hit


def test_the_next_adapter_is_loaded_ahead() -> None:
    """While both slots are in use the third one's load is under way, in a place more; it begins as soon as a slot is free."""
    alone = Alone()
    alone.ask("a", 0.0, tokens=100)
    alone.ask("b", 0.0, tokens=300)
    third = alone.ask("c", 0.1)
    alone.until(1.0)
    assert sorted(alone.replica.residents.names()) == ["a", "b", "c"]
    assert third.first < 0
    alone.until(3.0)
    assert third.first == pytest.approx(0.5 + 100 * 0.012 + 0.012, abs=0.02)
    assert not third.hit  # it had to be loaded, if not to be waited for


def test_an_engine_holds_no_more_than_it_can() -> None:
    """However requests come: as many adapters as there are slots run, and one more is loaded at most."""
    alone = Alone()
    random = np.random.default_rng(1)
    asked = [alone.ask(f"a{random.zipf(1.5) % 20}", at, int(random.integers(1, 60))) for at in np.arange(0, 20, 0.05)]
    for end in np.arange(20, 400, 0.5):
        alone.until(float(end))
        assert len(alone.replica.residents.names()) <= PLAIN.slots + 1
        assert alone.replica.adapters <= PLAIN.slots
    assert all(job.finished > 0 for job in asked)
    assert not alone.replica.residents.expected


def test_traffic_is_what_was_asked_for() -> None:
    """The same seed makes the same requests; popularity is skewed, the rate is right."""
    traffic = Traffic(requests=20_000, adapters=100, zipf=1.0)
    made = list(jobs(traffic, MODELS["h100"], 4, 2))
    assert [job.adapter for job in made] == [job.adapter for job in jobs(traffic, MODELS["h100"], 4, 2)]
    assert len(made) / made[-1].arrived == pytest.approx(traffic.rate(MODELS["h100"], 4), rel=0.05)
    counts = sorted((sum(job.adapter == f"a{n}" for job in made) for n in range(100)), reverse=True)
    assert counts[0] > 5 * counts[20] > 0


@pytest.mark.parametrize("burst", [1.0, 4.0, 9.0])
def test_bursts(burst: float) -> None:
    """One second of every ten has so many times the mean rate, and the mean stays what it was."""
    traffic = Traffic(requests=40_000, adapters=10, burst=burst)
    made = list(jobs(traffic, MODELS["h100"], 4, 2))
    whole = made[-1].arrived // 10
    mean = traffic.rate(MODELS["h100"], 4)
    peak = sum(job.arrived % 10 < 1 and job.arrived < 10 * whole for job in made) / whole
    assert peak == pytest.approx(burst * mean, rel=0.1)
    assert len(made) / made[-1].arrived == pytest.approx(mean, rel=0.1)


def test_ours_beats_random_and_comes_near_the_oracle() -> None:
    """At high load: a fraction of random's p99, close to what an oracle reaches, and more hits than ways without affinity."""
    random, ours, oracle = (simulated(strategy) for strategy in ("random", "ours", "oracle"))
    assert ours.ttft_p99_s < random.ttft_p99_s / 2
    assert ours.ttft_p99_s < 1.1 * oracle.ttft_p99_s
    assert oracle.hit_rate > ours.hit_rate > 1.3 * random.hit_rate


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_lost(strategy: str) -> None:
    """Every request ends, also when engines die on the way and the rate swings."""
    result = simulated(strategy, deaths=3, requests=600, adapters=60, burst=3)
    assert result.lost == 0
    assert result.failovers > 0


def test_all_but_one_may_die() -> None:
    """Each of them once, whatever their number: the last one answers everything."""
    result = simulated("ours", replicas=14, deaths=13, requests=1000)
    assert result.lost == result.refused == 0
    with pytest.raises(ValueError, match="14 deaths leave none of 14"):
        simulated("ours", replicas=14, deaths=14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_is_below_the_floor(strategy: str) -> None:
    """The oracle neither: that is what makes it a floor."""
    simulation = Simulation(strategy, MODELS["h100"], 8, Traffic(requests=1500, adapters=500, load=0.6))
    result = simulation.run()
    assert result.ttft_p99_s >= result.floor_p99_s > MODELS["h100"].load(16)
    ttft = np.array([job.first - job.arrived for job in simulation._jobs])
    assert (ttft >= floor(simulation._jobs, MODELS["h100"]) - 1e-6).all()


@pytest.mark.parametrize("strategy", ["ours", "consistent-hashing"])
@pytest.mark.parametrize("replicas", [2, 16, 48])
def test_little_moves_when_the_fleet_changes(strategy: str, replicas: int) -> None:
    """One more replica, or one less, moves at most twice its ideal share of the loaded adapters; all others are at home."""
    movement = simulated(strategy, replicas=replicas, requests=100 * replicas, adapters=1000, load=0.7).movement
    assert movement
    assert 0 < movement.joined <= 2 / (replicas + 1)
    assert 0 < movement.died <= 2 / replicas
    assert movement.astray < 0.05


@pytest.mark.parametrize("strategy", ["random", "least-loaded"])
def test_what_places_nothing(strategy: str) -> None:
    """Without affinity nearly all loaded adapters would be loaded elsewhere by their next request, whatever changes."""
    movement = simulated(strategy, replicas=16, adapters=1000).movement
    assert movement
    assert movement.astray > 0.8


def test_a_new_replica_has_its_share_of_ours_only() -> None:
    """Power of two leaves adapters where they are: nothing is the newcomer's, so it gets what is loaded nowhere, at best."""
    movement = simulated("power-of-two", replicas=16, adapters=1000).movement
    assert movement
    assert movement.joined == 0


def test_as_large_as_it_gets() -> None:
    """512 engines and 100,000 adapters; also while nothing is loaded yet, nobody does better than who knows the future."""
    ours, oracle = (simulated(name, replicas=512, requests=1000, adapters=100_000) for name in ("ours", "oracle"))
    assert ours.lost == ours.refused == 0
    assert ours.movement
    assert oracle.ttft_p99_s < 1.05 * ours.ttft_p99_s


def test_command(tmp_path: Path) -> None:
    """`loraplex simulate` prints and draws a row for each way, and says what is ideal."""
    chart = tmp_path / "bars.png"
    words = ("--requests", "600", "--adapters", "1000", "--replicas", "8", "--deaths", "1", "--chart", chart)
    done = call("simulate", *words)
    assert done.code == 0
    assert all(strategy in done.out for strategy in STRATEGIES)
    assert "does not stick" in done.out
    assert "Ideal is 11.11% moved by one more engine, 12.50% by one less" in done.out
    assert "No choice of engines brings the p99 below" in done.out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_command_over_loads(tmp_path: Path) -> None:
    """Several loads, or several fleets, make one chart; JSON has each result with its fleet and load."""
    chart = tmp_path / "new" / "loads.png"
    words = ("--requests", "200", "--adapters", "20", "--strategy", "ours", "--strategy", "oracle", "--json")
    done = call("simulate", *words, "--replicas", "2", "--load", "0.9", "--load", "0.5", "--chart", chart)
    found = [(one["strategy"], one["load"]) for one in done.json["results"]]
    assert found == [("ours", 0.5), ("oracle", 0.5), ("ours", 0.9), ("oracle", 0.9)]
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert done.json["results"][0]["movement"].keys() == {"astray", "joined", "died"}
    assert done.json["results"][1]["movement"] is None
    done = call("simulate", *words, "--replicas", "1", "--replicas", "4", "--chart", chart)
    assert Counter(one["replicas"] for one in done.json["results"]) == {1: 2, 4: 2}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--strategy", "luck"), "choose from random"),
        (("--engine", "b200"), "choose from cpu, h100"),
        (("--deaths", "16"), "leave none of 16 engines"),
        (("--replicas", "4", "--replicas", "8", "--load", "0.5", "--load", "0.6"), "not both"),
        (("--chart", "loads.jpg"), "does not end in .png"),
        (("--chart", "/dev/null/loads.png"), "cannot be written"),
        (("--replicas", "513"), "should be less than or equal to 512"),
        (("--replicas", "0"), "should be greater than or equal to 1"),
        (("--adapters", "100001"), "should be less than or equal to 100000"),
        (("--load", "0"), "should be greater than or equal to 0.01"),
        (("--burst", "10"), "should be less than or equal to 9"),
    ],
)
def test_what_cannot_be_simulated(words: tuple[str, ...], problem: str) -> None:
    """A bad value is refused at once, by its option's name."""
    wrong = call("simulate", *words)
    assert wrong.code in (1, 2)
    assert problem in wrong.err
    assert words[0] in wrong.err or words[-2] in wrong.err

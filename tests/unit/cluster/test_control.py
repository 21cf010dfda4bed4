"""What Ray's part decides: who is listed, how many engines there are, what a new one loads, what a cluster lacks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from engine.api.loraplex.v1 import engine_pb2
from engine.cluster.ray.children import own_folder
from engine.cluster.ray.fleet import Fleet
from engine.cluster.ray.local import check_resources
from engine.cluster.ray.scaling import Targets, desired
from engine.cluster.routing import Ask, Rendezvous, Report
from engine.cluster.routing.warming import to_warm
from engine.commands import cluster
from engine.config import ClusterSettings, load
from engine.errors import BadConfiguration, NotEnoughResources


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_fleet_lists_who_reports() -> None:
    """Replicas are listed while they report, and not for long after."""
    clock = Clock()
    fleet = Fleet(clock=clock)
    clock.now = 10
    assert not await fleet.heartbeat("a:1", b"one")
    assert await fleet.addresses() == ["a:1"]
    assert await fleet.reports() == {"a:1": b"one"}
    clock.now = 20
    await fleet.heartbeat("b:1", b"two")
    assert await fleet.addresses() == ["b:1"]
    await fleet.leave("b:1")
    assert await fleet.addresses() == []


async def test_a_restarted_fleet_says_nothing_before_everybody_has_reported() -> None:
    """Its first list is not the empty one: routers keep what they know until all had time to report."""
    clock = Clock()
    fleet = Fleet(clock=clock)
    waiting = asyncio.create_task(fleet.addresses(["a:1", "b:1"]))
    await fleet.heartbeat("a:1", b"")
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.now = 2
    await fleet.heartbeat("b:1", b"")
    clock.now = 4
    await fleet.heartbeat("c:1", b"")
    assert await waiting == ["a:1", "b:1", "c:1"]


async def test_draining_is_told_by_the_heartbeat() -> None:
    """A replica hears that it shall drain when it reports; nobody else does."""
    clock = Clock()
    fleet = Fleet(clock=clock)
    await fleet.heartbeat("a:1", b"")
    assert not await fleet.drain("x:1")
    assert await fleet.drain("a:1")
    assert await fleet.heartbeat("a:1", b"")
    assert not await fleet.heartbeat("b:1", b"")


@pytest.mark.parametrize(
    ("stats", "current", "wanted"),
    [
        ({}, 3, 2),  # idle: one step down
        ({"waiting_tokens": 2000}, 4, 4),  # at its target
        ({"waiting_tokens": 2400}, 10, 12),
        ({"waiting_tokens": 100_000}, 4, 8),  # never more than twice as many at once
        ({"kv_cache_usage": 0.9}, 8, 9),
        ({"waiting_adapters": 3}, 2, 3),
        ({"busy": 0.6}, 4, 4),  # one fewer would be too close to the target
        ({"busy": 0.3}, 4, 3),
        ({"busy": 0.1, "kv_cache_usage": 0.79}, 8, 8),  # the greatest wish counts
        ({}, 1, 1),
    ],
)
def test_scaling(stats: dict[str, float], current: int, wanted: int) -> None:
    """Up by what is needed most, down slowly, never to nothing."""
    assert desired([stats] * current, current) == wanted


def test_scaling_settles() -> None:
    """Under a steady load the number of engines comes to rest, from below and from above."""
    for begin in (1, 64):
        current = begin
        for _ in range(100):
            load = 20_000 / current  # tokens that wait at each
            current = desired([{"waiting_tokens": load, "busy": min(1.0, 8 / current)}] * current, current, Targets())
        again = desired([{"waiting_tokens": 20_000 / current, "busy": min(1.0, 8 / current)}] * current, current)
        assert again == current
        assert 10 <= current <= 14


def test_a_new_replica_loads_what_will_be_its_own() -> None:
    """It takes the adapters that prefer it to all others, the most used first, as many as fit, of its own base."""
    adapters = [f"a{number}" for number in range(40)]
    held = Report("base", 8, 4, residents={name: frozenset({"v1"}) for name in adapters}, in_use={"a7": 3})
    others = {"r0": held, "r1": held, "r2": Report("other", 8, 4, residents={"x": frozenset({"v1"})})}
    ring = Rendezvous({"r0": 8, "r1": 8, "new": 8})
    mine = {f"{name}@v1" for name in adapters if ring.first(Ask(name).key)[0] == "new"}
    loaded = to_warm("new", Report("base", 8, 4), others)
    assert len(loaded) == 4
    assert set(loaded) <= mine
    everything = to_warm("new", Report("base", 8, 100), others)
    assert set(everything) == mine
    assert everything[0] == "a7@v1" or "a7@v1" not in mine


def test_a_cluster_that_is_too_small() -> None:
    """What is missing is said, with what there is."""
    with pytest.raises(NotEnoughResources, match="4 replicas need 8 GPUs, there are 2"):
        check_resources(ClusterSettings(replicas=4, gpus=2), {"CPU": 16, "GPU": 2})
    check_resources(ClusterSettings(replicas=4, gpus=2), {"CPU": 16, "GPU": 8})
    nodes = {"CPU": 16, "node:10.0.0.1": 1, "node:10.0.0.2": 1, "node:__internal_head__": 1}
    check_resources(ClusterSettings(routers=2), nodes)
    with pytest.raises(NotEnoughResources, match="need 3 nodes, there are 2"):
        check_resources(ClusterSettings(routers=3), nodes)


@pytest.mark.parametrize(
    ("given", "cpus"),
    [
        ({"replicas": 1}, 8.0),
        ({"replicas": 3}, 2.0),
        ({"replicas": 2, "max_replicas": 4}, 2.0),
        ({"replicas": 20}, 1.0),
        ({"replicas": 2, "cpus": 0.1}, 0.1),
        ({"replicas": 2, "ray": "auto"}, 1.0),
        ({"replicas": 2, "ray": "auto", "cpus": 4}, 4.0),
    ],
)
def test_cpus_of_an_engine(given: dict[str, Any], cpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Ray of our own an engine gets its share of the machine, on another one what was said."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert ClusterSettings(**given).engine_cpus == cpus


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"replicas": 4, "max_replicas": 2}, "max_replicas"),
        ({"replicas": 0}, "max_replicas"),
        ({"host": "0.0.0.0"}, "allow-remote"),
        ({"ray": "10.0.0.1:6379"}, "allow-remote"),
        ({"name": "Not A Name"}, "name"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], problem: str) -> None:
    """Each is refused before Ray is started, naming itself."""
    with pytest.raises(BadConfiguration, match=problem):
        load(ClusterSettings, **wrong)


def test_status_points_out_different_software_versions() -> None:
    """With how many replicas run which; if all run the same, nothing is said."""
    engines = [engine_pb2.GetEngineResponse(server_version=version) for version in ("1.1", "1.0", "1.1")]
    rows = [cluster._row(f"a:{number}", engine) for number, engine in enumerate(engines)]
    assert cluster._mixed(rows) == ["the replicas run different software versions: 1.0 (1 of 3), 1.1 (2 of 3)"]
    assert not cluster._mixed(rows[::2])
    engines[0].load.restarting = engines[0].load.dead = True
    assert cluster._row("a:0", engines[0])["state"] == "dead"


def test_engines_share_no_folder(tmp_path: Path) -> None:
    """Each takes the first that is free; one that ended has left its copies to the next."""
    with own_folder(tmp_path) as (first, lock):
        kept = os.dup(lock)  # as its server keeps it
        with own_folder(tmp_path) as (second, _):
            assert (first.name, second.name) == ("engine-0", "engine-1")
    with own_folder(tmp_path) as (third, _):
        assert third == second
    os.close(kept)
    with own_folder(tmp_path) as (fourth, _):
        assert fourth == first

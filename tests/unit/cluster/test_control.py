"""What Ray's part decides: who is listed, how many engines there are, what a new one loads, what a cluster lacks."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engine.api.loraplex.v1 import engine_pb2
from engine.cluster.ray.fleet import Fleet
from engine.cluster.ray.folders import fresh_folder, own_folder
from engine.cluster.ray.local import check_resources
from engine.cluster.routing import Ask, Rendezvous, Report
from engine.cluster.routing.warming import to_pin, to_warm
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


async def test_a_fleet_that_stood_still_says_nothing_before_everybody_has_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its process was stopped: no replica is gone for that, nor forgotten; one that does not report afterwards is."""
    monkeypatch.setattr("engine.cluster.ray.fleet.HEARTBEAT_S", 0.01)
    clock = Clock()
    fleet = Fleet(clock=clock)
    both = ["a:1", "b:1"]
    for address in both:
        await fleet.heartbeat(address, b"")
    clock.now = 4
    waiting = asyncio.create_task(fleet.addresses(both))
    await asyncio.sleep(0)
    clock.now = 12
    assert await waiting is None
    assert (await fleet.reports()).keys() == set(both)
    again = asyncio.create_task(fleet.addresses())
    await asyncio.sleep(0.05)
    assert not again.done()
    clock.now = 14
    await fleet.heartbeat("a:1", b"")
    await asyncio.sleep(0.05)
    assert not again.done()
    clock.now = 16
    assert await again == both
    clock.now = 18.5
    assert await fleet.addresses() == ["a:1"]


async def test_draining_is_told_by_the_heartbeat() -> None:
    """A replica hears that it shall drain when it reports; nobody else does."""
    clock = Clock()
    fleet = Fleet(clock=clock)
    await fleet.heartbeat("a:1", b"")
    assert not await fleet.drain("x:1")
    assert await fleet.drain("a:1")
    assert await fleet.heartbeat("a:1", b"")
    assert not await fleet.heartbeat("b:1", b"")


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


def test_a_new_replica_keeps_what_the_others_keep() -> None:
    """It pins what replicas of its base have pinned, and what else it loads leaves room for that."""
    adapters = [f"a{number}" for number in range(40)]
    held = {name: frozenset({"v1"}) for name in adapters}
    pinned = frozenset({"a1@v1", "a2@v1"})
    others = {"r0": Report("base", 8, 4, residents=held, pinned=pinned), "r1": Report("base", 8, 4)}
    others["r2"] = Report("other", 8, 4, pinned=frozenset({"x@v1"}))
    assert to_pin(Report("base", 8, 4), others) == ["a1@v1", "a2@v1"]
    loaded = to_warm("new", Report("base", 8, 4), others)
    assert len(loaded) == 2
    assert not pinned & set(loaded)
    assert to_warm("new", Report("base", 8, 1), others) == []


SMALL, LARGE = {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 8.0}
FOUR_GPUS = {"gpus": 4, "cpus": 2, "replicas": 2}


@pytest.mark.parametrize(
    ("settings", "nodes", "problem"),
    [
        ({"replicas": 4, "gpus": 2, "cpus": 1}, [LARGE], None),
        (
            {"replicas": 4, "gpus": 2, "cpus": 1},
            [SMALL],
            "4 engines need 1 CPU and 2 GPUs of one node each, and beside the routers there is room for 1: "
            "10.0.0.1: 16 CPUs and 2 GPUs, room for 1",
        ),
        (FOUR_GPUS, [LARGE], None),
        (
            FOUR_GPUS,  # eight in all, but nowhere four
            [SMALL, SMALL, SMALL, SMALL],
            "2 engines need 2 CPUs and 4 GPUs of one node each, and beside the routers there is room for 0: "
            "10.0.0.1 and 3 more like it: 16 CPUs and 2 GPUs, which lacks 2 GPUs",
        ),
        (
            FOUR_GPUS,
            [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 4.0}, {"memory": 1.0}],
            "room for 1: 10.0.0.1: 16 CPUs and 4 GPUs, room for 1; 10.0.0.2: 1 CPU and 4 GPUs, which lacks 1 CPU; "
            "10.0.0.3: 0 CPUs and 0 GPUs, which lacks 2 CPUs and 4 GPUs",
        ),
        ({"replicas": 2, "cpus": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], None),
        ({"replicas": 2, "cpus": 3}, [{"CPU": 4.0}, {"CPU": 2.0}], "lacks 1 CPU"),
        ({"replicas": 19, "cpus": 0.1}, [{"CPU": 2.0}], None),
        ({"replicas": 1, "next_model": "b", "next_replicas": 2, "cpus": 2}, [{"CPU": 5.0}], "3 engines .* room for 2"),
        ({"replicas": 4, "cpus": 2}, [{"CPU": 4.0}, {"CPU": 4.0}], "room for 3"),  # the router has to be somewhere
        ({"replicas": 4, "cpus": 2}, [{"CPU": 4.0}, {"CPU": 5.0}], None),
        (
            {"replicas": 4, "cpus": 2, "routers": 2},
            [{"CPU": 4.0}, {"CPU": 5.0}],
            "beside the routers there is room for 3",
        ),
        ({"cpus": 1, "routers": 2}, [SMALL, SMALL], None),
        ({"cpus": 1, "routers": 3}, [SMALL, SMALL], "3 routers need a node with CPUs each: 2 of 2 have some"),
        ({"cpus": 1, "routers": 2}, [SMALL, {"CPU": 0.0, "GPU": 2.0}], "each: 1 of 2 have some"),  # none on such a head
        ({"cpus": 1}, [], "there is no node"),
    ],
)
def test_a_cluster_that_is_too_small(
    settings: dict[str, Any], nodes: list[dict[str, float]], problem: str | None
) -> None:
    """An engine is on one node, whatever there is in all; the error says which node lacks what."""
    there = [(f"10.0.0.{number}", has) for number, has in enumerate(nodes, 1)]
    if problem is None:
        check_resources(ClusterSettings(**settings), there)
        return
    with pytest.raises(NotEnoughResources, match=problem):
        check_resources(ClusterSettings(**settings), there)


@pytest.mark.parametrize(
    ("given", "cpus"),
    [
        ({"replicas": 1}, 8.0),
        ({"replicas": 3}, 2.0),
        ({"replicas": 2, "max_replicas": 4}, 2.0),
        ({"replicas": 2, "next_model": "b", "next_replicas": 2}, 2.0),
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
        ({"replicas": 0}, "replicas"),
        ({"replicas": 0, "max_replicas": 4}, "replicas"),  # who would start the first one?
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


def test_folders_of_those_who_ended_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest to end leave theirs; one that runs keeps its own, however old, and nobody else's is touched."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("engine.cluster.ray.folders._KEPT", 2)
    (tmp_path / "f-engine-of-another-kind").mkdir()
    with fresh_folder("f-router-") as (router, _), fresh_folder("f-engine-") as (runs, lock):
        kept = os.dup(lock)  # as its server keeps it
    others = {router, tmp_path / "f-engine-of-another-kind"}
    ended = []
    for number in range(4):
        with fresh_folder("f-engine-") as (folder, _):
            ended.append(folder)
            (folder / "serve.log").touch()
            os.utime(folder / "serve.log", (2e9 + number, 2e9 + number))
            (folder / "serve.yaml").touch()
    with fresh_folder("f-engine-") as (latest, _):
        assert set(tmp_path.iterdir()) == others | {runs, latest, *ended[-2:]}
    os.close(kept)

"""The Ray Serve application, without Ray: how engines and routers are placed, and what a change replaces."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from engine.commands import cluster
from engine.config import ClusterSettings, load
from engine.errors import BadConfiguration

with warnings.catch_warnings(action="ignore"):  # Ray's own, about pydantic
    pytest.importorskip("ray")
    from ray import serve
    from ray.serve._private.version import DeploymentVersion

    from engine.cluster.ray.application import application, assigned, build, checked_environment
    from engine.cluster.ray.control import Remembered

FIRST, SECOND = "EngineReplica", "SecondEngineReplica"
A, B, C = Path("/models/a"), Path("/models/b"), Path("/models/c")


def deployments(before: Mapping[str, str] = {}, *, room: bool = True, **settings: Any) -> dict[str, Any]:
    """What an application consists of, by name."""
    given = {"ray": "auto", "model": A} | settings
    spec = ClusterSettings(**given)
    router = application(spec, assigned(spec.bases, before), room=room)._bound_deployment
    engines = [each._bound_deployment for each in router.init_args[1:]]
    return {each.name: each for each in (router, *engines)}


def bounds(deployment: Any) -> tuple[int, int]:
    """Between which its number is."""
    config = deployment._deployment_config.autoscaling_config
    return config.min_replicas, config.max_replicas


def replaced(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Whose running actors Ray replaces, as it decides that itself."""
    both = before.keys() & after.keys()
    return {name for name in both if _version(before[name]).requires_actor_restart(_version(after[name]))}


def _version(deployment: Any) -> DeploymentVersion:
    told = deployment._replica_config
    return DeploymentVersion(
        deployment.version,
        deployment._deployment_config,
        told.ray_actor_options,
        placement_group_bundles=told.placement_group_bundles,
        placement_group_strategy=told.placement_group_strategy,
        max_replicas_per_node=told.max_replicas_per_node,
    )


@pytest.mark.parametrize(
    ("gpus", "bundle"), [(0, {"CPU": 2.0}), (1, {"CPU": 2.0, "GPU": 1.0}), (4, {"CPU": 2.0, "GPU": 4.0})]
)
def test_an_engine_reserves_all_that_it_needs_at_once(gpus: int, bundle: dict[str, float]) -> None:
    """In a placement group of one bundle, and its actor takes all of that: Ray shows it all of its GPUs, and no others."""
    engine = deployments(cpus=2, gpus=gpus)[FIRST]
    assert engine._replica_config.placement_group_bundles == [bundle]
    assert engine._replica_config.placement_group_strategy == "STRICT_PACK"
    assert engine.ray_actor_options == {"num_cpus": 2.0, "num_gpus": gpus}


def test_the_runtime_environment_is_for_engines_and_routers() -> None:
    """Ray gives it to their actors; a change replaces both."""
    plain, dressed = deployments(), deployments(runtime_env={"env_vars": {"NCCL_DEBUG": "INFO"}})
    assert all("runtime_env" not in each.ray_actor_options for each in plain.values())
    assert all(each.ray_actor_options["runtime_env"]["env_vars"] == {"NCCL_DEBUG": "INFO"} for each in dressed.values())
    assert replaced(plain, dressed) == {FIRST, "Router"}


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"env_var": {"A": "1"}}, "Ray knows no env_var"),
        ({"env_vars": {"A": 1}}, "env_vars"),
        ({"env_vars": "A=1"}, "env_vars"),
        ({"working_dir": "/tmp"}, "runtime_env"),
        ({"pip": ["x"], "conda": "y"}, "cannot be specified at the same time"),
    ],
)
def test_a_wrong_runtime_environment(wrong: dict[str, Any], problem: str) -> None:
    """Refused before anything is started; Ray alone would try to start actors with it again and again."""
    with pytest.raises(BadConfiguration, match=problem):
        checked_environment(wrong)


def test_a_runtime_environment_stays_what_it_is() -> None:
    """`scale` takes what was checked before, and nothing is replaced for it."""
    once = checked_environment({"pip": ["x==1"], "env_vars": {"A": "1"}})
    assert checked_environment(once) == once


@pytest.mark.parametrize(
    ("changes", "whom"),
    [
        ({}, set()),
        ({"replicas": 7, "routers": 3}, set()),
        ({"replicas": 2, "max_replicas": 9, "scale_up_after_s": 1}, set()),
        ({"next_model": B, "next_replicas": 3}, set()),
        ({"gpus": 2}, {FIRST}),
        ({"engine": {"max_resident": 3}}, {FIRST}),
        ({"model": B}, {FIRST}),
        ({"router": {"workers": 2}}, {"Router"}),
    ],
)
def test_what_a_change_replaces(changes: dict[str, Any], whom: set[str]) -> None:
    """Those who are told something else, and nobody for other numbers or for a second base."""
    assert replaced(deployments(), deployments({FIRST: str(A)}, **changes)) == whom


def test_a_base_changes_without_a_restart() -> None:
    """The second base's engines are left alone when it becomes the main one; only their number changes."""
    beside = deployments({FIRST: str(A)}, next_model=B, next_replicas=1)
    assert [bounds(beside[name]) for name in (FIRST, SECOND)] == [(2, 2), (1, 1)]
    after = deployments({FIRST: str(A), SECOND: str(B)}, model=B)
    assert after.keys() == {SECOND, "Router"}
    assert bounds(after[SECOND]) == (2, 2)
    assert not replaced(beside, after)


@pytest.mark.parametrize(
    ("bases", "before", "wanted"),
    [
        ([A], {}, {FIRST: A}),
        ([A, B], {}, {FIRST: A, SECOND: B}),
        ([B], {FIRST: A, SECOND: B}, {SECOND: B}),
        ([A], {FIRST: A, SECOND: B}, {FIRST: A}),
        ([B, A], {FIRST: A, SECOND: B}, {SECOND: B, FIRST: A}),
        ([B, C], {SECOND: B}, {SECOND: B, FIRST: C}),
        ([C], {SECOND: B}, {SECOND: C}),  # in place of the base before it
        ([C], {FIRST: A, SECOND: B}, {FIRST: C}),
        ([C, B], {FIRST: A, SECOND: B}, {FIRST: C, SECOND: B}),
        ([A, C], {FIRST: A, SECOND: B}, {FIRST: A, SECOND: C}),
    ],
)
def test_who_has_which_base(bases: list[Path], before: dict[str, Path], wanted: dict[str, Path]) -> None:
    """A base that runs stays where it is; a new main one takes the old one's place; the main one is the first."""
    found = assigned([str(each) for each in bases], {name: str(model) for name, model in before.items()})
    assert list(found.items()) == [(name, str(model)) for name, model in wanted.items()]


def test_what_is_refused_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next change would take the refused bases for those that run, and swap them."""
    kept: list[Remembered] = []
    where = "engine.cluster.ray.application"
    monkeypatch.setattr(f"{where}.start_fleet", MagicMock())
    monkeypatch.setattr(f"{where}.remembered", lambda _: kept[-1] if kept else None)
    monkeypatch.setattr(f"{where}.remember", kept.append)
    monkeypatch.setattr(f"{where}._has_room", lambda *_: True)
    build({"ray": "auto", "model": str(A)})
    with pytest.raises(BadConfiguration):
        build({"ray": "auto", "model": str(B), "replicas": 5, "engine": {"max_residnt": 16}})
    assert [(dict(each.engines), each.spec.replicas) for each in kept] == [({FIRST: str(A)}, 2)]
    build({"ray": "auto", "model": str(A), "next_model": str(B)})
    assert kept[-1].engines == {FIRST: str(A), SECOND: str(B)}


def test_engines_are_replaced_in_advance_only_where_there_is_room() -> None:
    """Without, Ray would wait for it for ever."""
    full, roomy = (deployments(room=room)[FIRST]._deployment_config.max_surge_percent for room in (False, True))
    assert (full, roomy) == (0, 20)


def test_the_delays_of_scaling_are_settings() -> None:
    """And means do not reach further back than fewer engines have to be enough."""
    for given, wanted in (({}, (5, 120, 30)), ({"scale_up_after_s": 1, "scale_down_after_s": 4}, (1, 4, 12))):
        config = deployments(max_replicas=4, **given)[FIRST]._deployment_config.autoscaling_config
        assert (config.upscale_delay_s, config.downscale_delay_s, config.look_back_period_s) == wanted


def test_a_fixed_number_is_a_bound_on_both_sides() -> None:
    """Scaled or not is no difference to a replica, which in Ray 2.60 reports only if it began to when it began."""
    assert bounds(deployments(replicas=3)[FIRST]) == (3, 3)
    both = deployments(replicas=3, max_replicas=5, next_model=B, next_replicas=4)
    assert [bounds(both[name]) for name in (FIRST, SECOND)] == [(3, 5), (4, 4)]


def test_the_same_base_twice_is_refused() -> None:
    """There would be nothing to change to."""
    with pytest.raises(BadConfiguration, match="next_model"):
        load(ClusterSettings, model=A, next_model=A)


def test_up_tells_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What Serve says of deployments without a place, once as long as it says the same, or whose controller is away."""
    looks = MagicMock()

    def status() -> Any:
        looks()
        if looks.call_count == 1:
            raise serve.exceptions.RayServeException("away")
        free = "none" if looks.call_count < 5 else "1 CPU"
        states = {"Router": SimpleNamespace(message=""), FIRST: SimpleNamespace(message=f"no place: {free} free")}
        return SimpleNamespace(applications={"loraplex": SimpleNamespace(deployments=states)})

    def run(*_: Any, **__: Any) -> None:
        until = time.monotonic() + 10
        while looks.call_count < 8 and time.monotonic() < until:
            time.sleep(0.01)

    monkeypatch.setattr(cluster, "_LOOK_S", 0.01)
    monkeypatch.setattr(serve, "start", MagicMock())
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr("engine.cluster.ray.application.build", MagicMock())
    cluster._run(ClusterSettings())
    assert capsys.readouterr().err.splitlines() == ["no place: none free", "no place: 1 CPU free"]
    before = looks.call_count
    time.sleep(0.1)
    assert looks.call_count == before

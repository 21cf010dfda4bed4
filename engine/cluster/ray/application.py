"""The Ray Serve application: engines and routers, placed and watched by Ray.

    serve run engine.cluster.ray.application:build model=/models/llama registry=s3://adapters/prod replicas=4 allow_remote=true

is what `loraplex cluster up` does, and what KubeRay's RayService names as `import_path`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import ray.util
from pydantic import ValidationError
from ray import serve
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import RayActorOptionsSchema

from engine.cluster.ray.actors import SLOW_S, EngineReplica, Router, engine_settings, router_settings
from engine.cluster.ray.control import Remembered, remember, remembered, start_fleet
from engine.cluster.ray.local import ROUTER_CPUS
from engine.config import ClusterSettings, load
from engine.errors import BadConfiguration

# What each kind is told, and so is: other settings may change without restarting it.
_ENGINES = ("name", "model", "registry", "cache", "engine", "cpus", "gpus", "allow_remote", "runtime_env")
_ROUTERS = ("name", "host", "port", "http_port", "allow_remote", "router", "runtime_env")
_DEPLOYMENTS = ("EngineReplica", "SecondEngineReplica")  # the second is there while the base changes
_ROOM_S = 2.0  # for Ray to find a place
_AT_ONCE_PERCENT = 20  # of the engines, rounded up, that are replaced at once
_LOOK_BACK_S = 30.0  # over which the scaling policy sees means
_SHORTEST_LOOK_BACK_S = 12.0  # replicas report every 10 s


def build(args: dict[str, Any]) -> Any:
    """The application, from ClusterSettings as a dictionary, as `serve run` and RayService pass them.

    Raises BadConfiguration.
    """
    spec = load(ClusterSettings, **args)
    # Else an engine's share of this machine, and so each engine, would change with their number.
    spec = spec.model_copy(update={"cpus": spec.engine_cpus, "runtime_env": checked_environment(spec.runtime_env)})
    start_fleet(spec.name)
    before = remembered(spec.name)
    engines = assigned(spec.bases, before.engines if before else {})
    more = max(0, spec.engines - (before.spec.engines if before else 0))
    made = application(spec, engines, room=_has_room(spec, more + len(engines)))
    remember(Remembered(spec, engines))  # not before: what is refused changes nothing, so nothing may go by it
    return made


def application(spec: ClusterSettings, engines: Mapping[str, str], *, room: bool) -> Any:
    """The application with these deployments of engines, from name to model, the main one first.

    With `room` new engines are started before old ones go: where there is none, Ray would wait for it for ever.
    """
    everything = spec.model_dump(mode="json")
    bound = []
    for number, (name, model) in enumerate(engines.items()):
        told = {each: everything[each] for each in _ENGINES} | {"model": model}
        least, most = spec.replicas, spec.max_replicas or spec.replicas
        if number:  # its number is what it was told, until it is the main one
            least = most = spec.next_replicas
        options = engine_options(spec, least, most) | {"max_surge_percent": _AT_ONCE_PERCENT if room else 0}
        bound.append(_deployment(EngineReplica, name, told, options).bind(told))
    told = {each: everything[each] for each in _ROUTERS}
    return _deployment(Router, "Router", told, router_options(spec)).bind(told, *bound)


def assigned(bases: Iterable[str], before: Mapping[str, str]) -> dict[str, str]:
    """Which deployment has which of the bases, the main one first, given which had which before.

    A base that runs stays where it is, so that a change of base ends without a restart; a new main one takes the place of
    the old one, whose engines Ray then replaces one after the other.
    """
    running = {model: name for name, model in before.items()}
    free = [name for name in dict.fromkeys((*before, *_DEPLOYMENTS)) if before.get(name) not in set(bases)]
    return {running[base] if base in running else free.pop(0): base for base in bases}


def engine_options(spec: ClusterSettings, least: int, most: int) -> dict[str, Any]:
    """How Ray places and watches engines of one base, and how many. Raises BadConfiguration."""
    return {
        "ray_actor_options": {"num_cpus": spec.engine_cpus, "num_gpus": spec.gpus} | _environment(spec),
        # One bundle, not one a GPU: Ray puts the actor into the first bundle and shows it the GPUs of that one alone, and
        # vLLM's workers are processes below it. A bundle is on one node; STRICT_PACK says so to Ray's autoscaler, too.
        "placement_group_bundles": [_bundle(spec)],
        "placement_group_strategy": "STRICT_PACK",
        "autoscaling_config": _scaling(spec, least, most),
        "max_ongoing_requests": 1000,
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": engine_settings(spec, "127.0.0.1", 1)["drain_s"] + 2 * SLOW_S,
    }


def router_options(spec: ClusterSettings) -> dict[str, Any]:
    """The same of a router. Raises BadConfiguration."""
    return {
        "ray_actor_options": {"num_cpus": ROUTER_CPUS} | _environment(spec),
        "num_replicas": spec.routers,
        "max_replicas_per_node": 2,  # a router and the one that takes its place
        "max_surge_percent": 100,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": router_settings(spec, Path())["drain_s"] + 2 * SLOW_S,
    }


def checked_environment(given: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime environment as Ray takes it for actors. Raises BadConfiguration."""
    if unknown := sorted(given.keys() - RuntimeEnv.known_fields):
        raise BadConfiguration(f"runtime_env: Ray knows no {', '.join(unknown)}")
    try:
        found = dict(RuntimeEnv(**given))
        RayActorOptionsSchema(runtime_env=found)
    except ValidationError as error:
        raise BadConfiguration(f"runtime_env: {error.errors()[0]['msg']}") from error
    except (TypeError, ValueError) as error:
        raise BadConfiguration(f"runtime_env: {error}") from error
    return found


def _deployment(actor: type, name: str, told: dict[str, Any], options: dict[str, Any]) -> Any:
    """The deployment, replaced by Ray only if this software or what it is told differs from what runs.

    Without a version of ours `serve.run` takes a random one, and replaces everything (ray/serve/_private/client.py,
    deploy_applications). The public `options` refuses one since Ray 2.60; this is how Serve itself gives one.
    """
    what = json.dumps([metadata.version("loraplex"), told], sort_keys=True)
    made: Any = serve.deployment(actor, name=name, **options)
    return made.options(version=hashlib.sha256(what.encode()).hexdigest()[:16], _internal=True)


def _environment(spec: ClusterSettings) -> dict[str, Any]:
    return {"runtime_env": spec.runtime_env} if spec.runtime_env else {}


def _bundle(spec: ClusterSettings) -> dict[str, float]:
    wanted = {"CPU": spec.engine_cpus, "GPU": float(spec.gpus)}
    return {name: amount for name, amount in wanted.items() if amount}


def _has_room(spec: ClusterSettings, engines: int) -> bool:
    """Whether Ray finds places for so many more engines now, by asking it for them."""
    group = ray.util.placement_group([_bundle(spec)] * engines)
    try:
        return bool(group.wait(_ROOM_S))
    finally:
        ray.util.remove_placement_group(group)


def _scaling(spec: ClusterSettings, least: int, most: int) -> AutoscalingConfig:
    """Bounds, which may be one number: in Ray 2.60 a replica that began without never reports what scaling goes by."""
    make_policy: Any = AutoscalingPolicy
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=spec.scale_up_after_s,
        downscale_delay_s=spec.scale_down_after_s,
        look_back_period_s=max(_SHORTEST_LOOK_BACK_S, min(_LOOK_BACK_S, spec.scale_down_after_s)),
        policy=make_policy(policy_function="engine.cluster.ray.scaling:policy"),
    )

"""What Ray keeps for us: the Fleet actor, and what was last asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.experimental import internal_kv

from engine.cluster.ray.fleet import Fleet
from engine.cluster.ray.local import NAMESPACE
from engine.config import ClusterSettings


@dataclass(frozen=True)
class Remembered:
    """What `cluster up` or `scale` last asked for, and which deployment has which model: the main one's is the first."""

    spec: ClusterSettings
    engines: Mapping[str, str]


def start_fleet(name: str) -> Any:
    """The Fleet actor, started if it is not there; it outlives whoever started it, and is restarted when it dies."""
    options: dict[str, Any] = {
        "name": _actor_name(name), "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True,
        "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0,
    }  # fmt: skip
    return ray.remote(Fleet).options(**options).remote()


def fleet_of(name: str) -> Any:
    """The Fleet actor. Raises ValueError when there is none."""
    return ray.get_actor(_actor_name(name), namespace=NAMESPACE)


def remember(known: Remembered) -> None:
    """Keep it in Ray's control store: the Fleet forgets all when it is started again."""
    content = {"spec": known.spec.model_dump(mode="json"), "engines": dict(known.engines)}
    internal_kv._internal_kv_put(known.spec.name, json.dumps(content), namespace=NAMESPACE)


def remembered(name: str) -> Remembered | None:
    """What was last asked for of the fleet of this name, if anything was."""
    data = internal_kv._internal_kv_get(name, namespace=NAMESPACE)
    if not data:
        return None
    content = json.loads(data)
    # Another version of this software, with settings that we do not know, may have written it.
    spec = {field: value for field, value in content["spec"].items() if field in ClusterSettings.model_fields}
    return Remembered(ClusterSettings(**spec), content["engines"])


def forget(name: str) -> None:
    """The fleet of this name is stopped: end its Fleet actor, and remember nothing of it."""
    ray.kill(fleet_of(name))
    internal_kv._internal_kv_del(name, namespace=NAMESPACE)


def _actor_name(name: str) -> str:
    return f"{name}-fleet"

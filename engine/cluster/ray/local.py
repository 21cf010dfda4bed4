"""Ray as we start or join it: token authentication on, nothing but loopback, little memory, no usage reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.config import ClusterSettings
from engine.errors import NoCluster, NotEnoughResources

_MIB = 1024 * 1024
# Ray's jobs API, dashboard and client run whatever they are told by whoever reaches them (CVE-2023-48022, CVE-2025-62593).
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_kill_child_processes_on_worker_exit": "0",  # ours drain first
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def connected(spec: ClusterSettings) -> Iterator[Any]:
    """Ray, joined at `spec.ray`, or started on this machine for the time of the block."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "namespace": "loraplex", "configure_logging": False}
    if spec.ray:
        options["address"] = spec.ray
    else:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": spec.object_store_mib * _MIB,
            "num_cpus": max(os.cpu_count() or 1, round(spec.engine_cpus * spec.replicas) + 1),
        }
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise NoCluster(f"no Ray cluster at {spec.ray!r}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_resources(spec: ClusterSettings, resources: dict[str, float]) -> None:
    """Raise NotEnoughResources saying what is missing, if the cluster has too little for `spec`."""
    nodes = sum(name.startswith("node:") and not name.endswith("__") for name in resources)
    wanted = {"CPU": spec.engine_cpus * spec.replicas, "GPU": float(spec.gpus * spec.replicas), "node": spec.routers}
    resources = resources | {"node": max(1.0, nodes)}  # a router each: a second place there is its successor's
    missing = {
        name: (amount, resources.get(name, 0.0)) for name, amount in wanted.items() if amount > resources.get(name, 0.0)
    }
    if missing:
        raise NotEnoughResources(spec.replicas, missing)

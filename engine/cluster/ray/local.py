"""Ray as we start or join it: token authentication on, nothing but loopback, little memory, no usage reports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from engine.config import ClusterSettings
from engine.errors import NoCluster, NotEnoughResources

Node = tuple[str, Mapping[str, float]]  # its address, and what it has in all

NAMESPACE = "loraplex"  # of Ray's: what is ours there
ROUTER_CPUS = 0.001  # next to nothing, but what a head that was started with --num-cpus 0 does not have
_MIB = 1024 * 1024
_ROUNDING = 1e-6
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

    options: dict[str, Any] = {"log_to_driver": False, "namespace": NAMESPACE, "configure_logging": False}
    if spec.ray:
        options["address"] = spec.ray
    else:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": spec.object_store_mib * _MIB,
            "num_cpus": max(os.cpu_count() or 1, round(spec.engine_cpus * spec.engines) + 1),
        }
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise NoCluster(f"no Ray cluster at {spec.ray!r}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_resources(spec: ClusterSettings, nodes: Sequence[Node]) -> None:
    """Raise NotEnoughResources saying what is missing where, if the nodes have too little for `spec`."""
    each = {name: amount for name, amount in (("CPU", spec.engine_cpus), ("GPU", float(spec.gpus))) if amount}
    for_routers = [has for _, has in nodes if has.get("CPU", 0.0) >= ROUTER_CPUS]  # one each
    beside = sum(_room({**has, "CPU": has["CPU"] - ROUTER_CPUS}, each) == _room(has, each) for has in for_routers)
    room = sum(_room(has, each) for _, has in nodes) - max(0, min(spec.routers, len(for_routers)) - beside)
    problems = []
    if room < spec.engines:
        there = "; ".join(_told(nodes, each)) or "there is no node"
        problems.append(
            f"{spec.engines} engines need {_amounts(each)} of one node each, and beside the routers there is "
            f"room for {max(0, room)}: {there}"
        )
    if spec.routers > len(for_routers):
        problems.append(
            f"{spec.routers} routers need a node with CPUs each: {len(for_routers)} of {len(nodes)} have some"
        )
    if problems:
        raise NotEnoughResources("; ".join(problems))


def _room(has: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many engines a node takes."""
    return min(int(has.get(name, 0.0) / amount + _ROUNDING) for name, amount in each.items())


def _told(nodes: Sequence[Node], each: Mapping[str, float]) -> Iterator[str]:
    """What the nodes have and lack, those that are alike together."""
    alike: dict[str, list[str]] = {}
    for address, has in nodes:
        mine = {name: has.get(name, 0.0) for name in each}
        lacking = {name: amount - mine[name] for name, amount in each.items() if amount > mine[name] + _ROUNDING}
        means = f"which lacks {_amounts(lacking)}" if lacking else f"room for {_room(has, each)}"
        alike.setdefault(f"{_amounts(mine)}, {means}", []).append(address)
    for what, addresses in alike.items():
        others = f" and {len(addresses) - 1} more like it" if len(addresses) > 1 else ""
        yield f"{addresses[0]}{others}: {what}"


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in amounts.items())

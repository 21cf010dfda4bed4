"""What Ray runs: an actor for each engine and router, which starts its process and watches it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import ray
import ray.util
import yaml

from engine.api.loraplex.v1 import engine_pb2
from engine.cluster.fleet.watcher import to_report
from engine.cluster.ray.children import RouterChild, ServerChild, free_port
from engine.cluster.ray.control import fleet_of
from engine.cluster.ray.fleet import HEARTBEAT_S
from engine.cluster.ray.folders import fresh_folder, own_folder
from engine.cluster.ray.scaling import ADAPTERS, BUSY, MEMORY, TOKENS
from engine.cluster.routing import Report
from engine.cluster.routing.warming import to_pin, to_warm
from engine.config import ClusterSettings, RouterSettings, Settings, load

SLOW_S = 15.0  # more than draining takes, so that Ray does not kill who drains
_START_S = 600.0
_ROUTER_START_S = 60.0
_AWAY_S = 1.0  # until a Router looks for the Fleet again
_KNOWN_S = 2.0  # after its first heartbeat every router has heard of a replica


class EngineReplica:
    """One engine: a `loraplex serve` process, its heartbeats, and its end."""

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]
        self._spec = ClusterSettings(**spec)
        self._fleet = fleet_of(self._spec.name)
        host = _own_address() if self._spec.allow_remote else "127.0.0.1"
        settings = engine_settings(self._spec, host, free_port(host))
        self._drain_s = settings["drain_s"]
        with (
            own_folder(Path(settings["cache"])) as (cache, cache_lock),
            fresh_folder(f"{self._spec.name}-engine-") as (folder, lock),
        ):
            self._child = ServerChild(settings | {"cache": str(cache)}, folder, keeps=(cache_lock, lock))
        self._engine = await asyncio.to_thread(self._child.wait_ready, _START_S)
        before = await self._warm()
        self._drained = False
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(_KNOWN_S)  # Ray drains an old one as soon as this returns
        with suppress(ray.exceptions.RayError):
            await self._pin_since(before)

    async def _warm(self) -> dict[str, Report]:
        """Load what the others have pinned and what will be asked for here, before anybody knows of this replica.

        Returns what they said of themselves.
        """
        others, report = await _reports(self._fleet), to_report(self._engine)
        for ref in to_pin(report, others):
            await asyncio.to_thread(self._child.pin, ref)
        for ref in to_warm(self._child.address, report, others):
            await asyncio.to_thread(self._child.preload, ref)
        return others

    async def _pin_since(self, before: Mapping[str, Report]) -> None:
        """Pin, and let go, what the others were told to while no router knew of this replica."""
        now, report = await _reports(self._fleet), to_report(self._engine)
        now.pop(self._child.address, None)
        known, wanted = to_pin(report, before), to_pin(report, now)
        for ref in wanted:
            if ref not in known:
                await asyncio.to_thread(self._child.pin, ref)
        if before.keys() <= now.keys():  # else it is perhaps kept by one that is away
            for ref in known:
                if ref not in wanted:
                    await asyncio.to_thread(self._child.pin, ref, pinned=False)

    async def _beat(self) -> None:
        while True:
            try:
                self._engine = await asyncio.to_thread(self._child.look)
                drain = await self._fleet.heartbeat.remote(self._child.address, self._engine.SerializeToString())
                if drain and not self._drained:
                    self._drained = True
                    await asyncio.to_thread(self._child.stop, self._drain_s + SLOW_S)
            except grpc.RpcError:
                pass  # the child counts how long it is silent, and check_health asks it
            except (ray.exceptions.RayError, ValueError):
                with suppress(ray.exceptions.RayError, ValueError):  # away, as it may be for a while
                    self._fleet = fleet_of(self._spec.name)  # it may have been started again under its name
            await asyncio.sleep(HEARTBEAT_S)

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces this replica when this raises."""
        self._child.check()
        if self._drained:
            raise RuntimeError("drained: to be replaced")
        if self._task.done():
            raise RuntimeError("its heartbeats have ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy goes by."""
        load, places = self._engine.load, max(1, self._engine.limits.max_running)
        return {
            TOKENS: float(load.waiting_tokens),
            MEMORY: load.kv_cache_usage,
            ADAPTERS: float(load.waiting_adapters),
            BUSY: load.running / places,
        }

    async def __del__(self) -> None:
        """Ray ends this replica: finish what runs, while routers send new requests elsewhere."""
        self._task.cancel()
        await asyncio.to_thread(self._child.stop, self._drain_s + SLOW_S)
        await self._fleet.leave.remote(self._child.address)


class Router:
    """One router: a `loraplex router` process, and the file that tells it where the replicas are."""

    async def __init__(self, spec: dict[str, Any], *engines: Any) -> None:  # type: ignore[misc]
        del engines  # named so that all are one application; requests go another way
        self._spec = ClusterSettings(**spec)
        self._known: list[str] | None = None
        with fresh_folder(f"{self._spec.name}-router-") as (folder, lock):
            self._file = folder / "fleet.yaml"
            self._write(await fleet_of(self._spec.name).addresses.remote() or [])
            settings = router_settings(self._spec, self._file)
            self._drain_s = settings["drain_s"]
            self._child = RouterChild(settings, folder, keeps=(lock,))
        self._task = asyncio.create_task(self._follow())
        await asyncio.to_thread(self._child.wait_ready, _ROUTER_START_S)

    async def _follow(self) -> None:
        while True:
            try:
                addresses = await fleet_of(self._spec.name).addresses.remote(self._known)
                if addresses is not None:
                    self._write(addresses)
            except (ray.exceptions.RayError, ValueError, OSError):
                # The Fleet is away, or the disk is full: the router goes on with what it has.
                await asyncio.sleep(_AWAY_S)

    def _write(self, addresses: list[str]) -> None:
        """At once or not at all: the router may be reading."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(yaml.safe_dump({"replicas": addresses}))
        os.replace(fresh, self._file)
        self._known = addresses

    def check_health(self) -> None:
        """As EngineReplica's."""
        self._child.check()
        if self._task.done():
            raise RuntimeError("it does not follow the Fleet any more")

    async def __del__(self) -> None:
        """Leave the port to the successor, and finish what runs: until then it has to know where the replicas are."""
        await asyncio.to_thread(self._child.stop, self._drain_s + SLOW_S)
        self._task.cancel()


def engine_settings(spec: ClusterSettings, host: str, port: int) -> dict[str, Any]:
    """Settings of one server. Raises BadConfiguration."""
    given: dict[str, Any] = {
        "model": spec.model, "registry": spec.registry, "cache": spec.cache, "host": host, "port": port, "http_port": 0,
        "fleet": spec.name, "allow_remote": spec.allow_remote, "tensor_parallel": max(1, spec.gpus), "log_format": "json",
    }  # fmt: skip
    return load(Settings, **(given | spec.engine)).model_dump(mode="json")


def router_settings(spec: ClusterSettings, file: Path) -> dict[str, Any]:
    """Settings of one router. Raises BadConfiguration."""
    given: dict[str, Any] = {
        "fleet": file, "name": spec.name, "host": spec.host, "port": spec.port, "http_port": spec.http_port,
        "allow_remote": spec.allow_remote, "share_port": True, "log_format": "json",
    }  # fmt: skip
    return load(RouterSettings, **(given | spec.router)).model_dump(mode="json")


async def _reports(fleet: Any) -> dict[str, Report]:
    """What each replica last told the Fleet of itself, by address."""
    reports = await fleet.reports.remote()
    return {name: to_report(engine_pb2.GetEngineResponse.FromString(data)) for name, data in reports.items()}


def _own_address() -> str:
    get: Any = ray.util.get_node_ip_address
    return str(get())

"""One router: its ports, its view of the fleet, and the services that forward to it."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from engine.api.loraplex.v1 import adapters_pb2_grpc, engine_pb2_grpc
from engine.cluster.fleet import Fleet, Source
from engine.cluster.router.adapters import AdapterFanOut
from engine.cluster.router.generation import GenerationForwarder
from engine.cluster.router.metrics import RouterMetrics
from engine.cluster.router.overview import Overview
from engine.config import MEBIBYTE, RouterSettings
from engine.errors import AddressInUse
from engine.server.app import KEEPALIVE, SERVICES
from engine.server.boundary import Boundary
from engine.server.http import SidePort

log = structlog.get_logger(__name__)


class RouterApp:
    """The router. Health says SERVING while one replica at least takes requests."""

    def __init__(self, settings: RouterSettings, source: Source) -> None:
        self.settings = settings
        self.metrics = RouterMetrics()
        self.fleet = Fleet(source, settings.poll_s)
        self.fleet.on_change = self._changed
        self.boundary = Boundary(self.metrics, settings.max_streams)
        self.health = HealthServicer()
        self.side_port = SidePort(self.metrics, alive=lambda: True, ready=self._ready)
        self.port = settings.port
        self.http_port = settings.http_port
        self._server: aio.Server | None = None
        self._telling: asyncio.Task[None] | None = None
        self._draining = False

    async def start(self) -> None:
        """Return when the router answers. Raises AddressInUse."""
        settings = self.settings
        self._server = self._make_server()
        address = f"{settings.host}:{settings.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressInUse(f"{address} (gRPC)") from error
        self.metrics.watch(self.fleet)
        await self.fleet.start()
        await self._tell()
        self.http_port = await self.side_port.start(settings.host, settings.http_port)
        await self._server.start()
        self.boundary.ready = True
        log.info(
            "routing",
            address=f"{settings.host}:{self.port}",
            replicas=len(self.fleet.links),
            usable=len(self.fleet.usable()),
        )

    async def stop(self) -> None:
        """Take no new calls, let those under way end, `drain_s` at most, and close everything."""
        self._draining = True
        await self._tell()
        if self._server:
            await self._server.stop(grace=self.settings.drain_s)
        if self._telling:
            self._telling.cancel()
        await self.side_port.stop()
        await self.fleet.stop()
        log.info("stopped")

    def _make_server(self) -> aio.Server:
        settings = self.settings
        options: list[tuple[str, Any]] = [
            ("grpc.so_reuseport", int(settings.workers > 1)),
            ("grpc.max_receive_message_length", settings.max_message_mib * MEBIBYTE),
            ("grpc.max_send_message_length", -1),
            *KEEPALIVE,
        ]
        server = aio.server(interceptors=[self.boundary], options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        forwarder = GenerationForwarder(self.fleet, self.metrics, settings.give_up_s)
        server.add_generic_rpc_handlers((forwarder.handler(),))
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterFanOut(self.fleet), server)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(Overview(self.fleet), server)
        if settings.reflection:
            names = [service.full_name for service in SERVICES]
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection([*names, health_name, reflection.SERVICE_NAME], server)
        return server

    def _ready(self) -> bool:
        return not self._draining and bool(self.fleet.usable())

    def _changed(self) -> None:
        self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        ready = self._ready()
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(service.full_name for service in SERVICES)):
            await self.health.set(name, status)

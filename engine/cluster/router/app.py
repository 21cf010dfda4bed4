"""One router: its ports, its view of the fleet, and the services that forward to it."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from typing import NoReturn

import structlog
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2_grpc, engine_pb2_grpc
from engine.cluster.fleet import Access, Fleet, Source
from engine.cluster.router import ports
from engine.cluster.router.adapters import AdapterFanOut
from engine.cluster.router.discovery import Discovery
from engine.cluster.router.generation import GenerationForwarder
from engine.cluster.router.metrics import RouterMetrics
from engine.cluster.router.overview import Overview
from engine.cluster.router.together import Pace
from engine.config import MEBIBYTE, RouterSettings
from engine.server.boundary import Boundary
from engine.server.grpc_server import Health, listen, make_server
from engine.server.http import SidePort
from engine.server.identity.tls import Tls
from engine.server.tracing import tracing_of
from engine.server.web.site import Site

log = structlog.get_logger(__name__)

_GOODBYE_S = 3.0  # for those who keep an HTTP connection to hear with their next answer that it ends


class RouterApp:
    """The router. Health says SERVING while one replica at least takes requests."""

    def __init__(self, settings: RouterSettings, source: Source) -> None:
        self.settings = settings
        self.metrics = RouterMetrics()
        self.tls = Tls.of(settings)
        self.fleet = Fleet(source, settings.poll_s, settings.name, Access.of(settings))
        self.fleet.on_change = self._changed
        self.pace = Pace()
        self.boundary = Boundary(self.metrics, settings.max_streams)
        self.boundary.tracing = self.tracing = tracing_of(settings, "loraplex-router")
        self.health = Health()
        self.interceptors: list[aio.ServerInterceptor] = [self.boundary]
        self.site = Site(self.interceptors, settings.host, settings.max_message_mib * MEBIBYTE)
        self.side_port = SidePort(
            self.metrics, alive=lambda: True, ready=self._ready, tls=self.tls, site=self.site,
            more=Discovery(self.fleet).routes(),
        )  # fmt: skip
        self.port = settings.port
        self.http_port = settings.http_port
        self._server: aio.Server | None = None
        self._telling: asyncio.Task[None] | None = None
        self._following: asyncio.Task[NoReturn] | None = None
        self._pacing: asyncio.Task[NoReturn] | None = None
        self._draining = False
        self._claims: list[socket.socket] = []

    async def start(self) -> None:
        """Return when the router answers. Raises AddressInUse."""
        settings = self.settings
        self._server = self._make_server()
        self.metrics.watch(self.fleet)
        if settings.share_port:
            self._claims = [ports.claim(port, settings.name) for port in (settings.port, settings.http_port) if port]
        await self.fleet.start()
        await self._tell()
        self.boundary.ready = True
        self.http_port = await self.side_port.start(settings.host, settings.http_port, share=settings.share_port)
        # Last: from the moment that it listens, callers of a router that it takes the place of may be sent here.
        self.port = listen(self._server, f"{settings.host}:{settings.port}", self.tls)
        await self._server.start()
        if settings.coalesce:
            self._pacing = asyncio.create_task(self.pace.watch())
        if self.tls:
            self._following = asyncio.create_task(self.tls.follow())
        if settings.unprotected:
            log.warning("other machines reach this router unprotected: --allow-remote", missing=settings.unprotected)
        log.info(
            "routing",
            address=f"{settings.host}:{self.port}",
            replicas=len(self.fleet.links),
            usable=len(self.fleet.usable()),
        )

    async def stop(self) -> None:
        """Take no new calls, let those under way end, `drain_s` at most, and close everything."""
        until = time.monotonic() + self.settings.drain_s
        self._draining = True
        await self._tell()
        if self._server:
            if self.settings.share_port:
                await self._hand_over()  # who still has an HTTP connection gets an answer, the last one by it
            else:
                self.boundary.draining = True  # the HTTP port stays open, for /metrics and /readyz
            left = max(0.0, until - time.monotonic())
            await asyncio.gather(self._server.stop(grace=left), self._until_idle(left))
        for task in (self._telling, self._following, self._pacing):
            if task:
                task.cancel()
        await self.side_port.stop()
        await self.fleet.stop()
        if self.tracing:
            await self.tracing.close()
        for claim in self._claims:
            claim.close()
        log.info("stopped")

    async def _until_idle(self, timeout_s: float) -> None:
        """Wait for answers over HTTP, for so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.side_port.until_idle()

    async def _hand_over(self) -> None:
        """Leave the ports to the others who listen there; gRPC's clients are sent to them when the server stops."""
        await ports.turn_away(self.port, self.http_port)
        ports.close(self.port)
        self.side_port.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(_GOODBYE_S, self.settings.drain_s)):
                await ports.until_left(self.http_port)

    def _make_server(self) -> aio.Server:
        settings = self.settings
        server = make_server(
            self.interceptors,
            self.health,
            max_message_mib=settings.max_message_mib,
            reflected=settings.reflection and not self._asks,
            share_port=settings.workers > 1 or settings.share_port,
        )
        forwarder = GenerationForwarder(self.fleet, self.metrics, self.pace, settings.give_up_s)
        for front in (server, self.site.calls):  # gRPC and HTTP
            front.add_generic_rpc_handlers((forwarder.handler(),))
            adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterFanOut(self.fleet), front)
            engine_pb2_grpc.add_EngineServiceServicer_to_server(Overview(self.fleet, ask=self._asks), front)
        return server

    @property
    def _asks(self) -> bool:
        """Whether the replicas ask who calls; then nothing is told here that they have not allowed."""
        return bool(self.settings.replica_key_file or self.settings.replica_tls_certificate)

    def _ready(self) -> bool:
        return not self._draining and bool(self.fleet.usable())

    def _changed(self) -> None:
        self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        await self.health.tell(serving=self._ready())

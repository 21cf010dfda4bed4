"""The whole single-machine server: one engine, its adapters, and the ports they are reached by.

Start: check the model folder, open the ports (health says NOT_SERVING), start the engine, say SERVING.
While it runs: an engine that dies is restarted (runtime/supervised.py); health says NOT_SERVING meanwhile.
Stop: say NOT_SERVING, let in-flight requests finish for a while, then end what is left with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from engine.api.loraplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)
from engine.config import MEBIBYTE, Settings, parse_weights
from engine.errors import AddressInUse
from engine.registry.cache import LocalCopies
from engine.registry.catalog import Catalog, InEngine
from engine.registry.checks import Limits
from engine.registry.fingerprint import Base, check_base, read_base
from engine.registry.registry import Registry
from engine.registry.signatures import check_key
from engine.registry.store import Store
from engine.registry.worth import Rates
from engine.runtime.admission import Admission, Rules
from engine.runtime.engine import Engine
from engine.runtime.fake import FakeEngine
from engine.runtime.generator import Generator
from engine.runtime.requests import Observer
from engine.runtime.residency import HostMemory, Residency, shared_folder
from engine.runtime.shadow import Shadows
from engine.runtime.spare import Spare
from engine.runtime.supervised import Supervised
from engine.server.activity import Activity
from engine.server.adapters import AdapterService
from engine.server.boundary import Boundary
from engine.server.engine_info import EngineService
from engine.server.generation import GenerationService
from engine.server.http import SidePort
from engine.server.identity import Identity
from engine.server.identity.tls import Tls
from engine.server.metrics import Metrics
from engine.server.moves import Moves
from engine.server.tracing import tracing_of
from engine.server.trials import Trials
from engine.server.web.inprocess import InProcess
from engine.server.web.site import Site

log = structlog.get_logger(__name__)

SERVICES = (
    *generation_pb2.DESCRIPTOR.services_by_name.values(),
    *adapters_pb2.DESCRIPTOR.services_by_name.values(),
    *engine_pb2.DESCRIPTOR.services_by_name.values(),
)
END_WITH_PARENT = "LORAPLEX_END_WITH_PARENT"  # environment: the parent's process id
_PARENT_S = 0.5  # between looks at it
_HEALTH_S = 0.1  # between looks at the engine
CONNECTIONS = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A unary Generate sends nothing while it decodes; by default a client that pings meanwhile is sent away.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Beyond 1,000 calls (by default) that the event loop has not looked at yet, gRPC ends everybody's with CANCELLED. One
    # caller who resets its calls as fast as it sends them would bring that about; ours is the bound that says UNAVAILABLE.
    ("grpc.server.max_pending_requests", 16_384),
    ("grpc.server.max_pending_requests_hard_limit", 32_768),
)


class App:
    """The server. `engine` may be given, for tests; otherwise the settings say which."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.identity = Identity(settings, self.metrics)
        self.activity = Activity(
            self.identity.quotas.weights if self.identity.on else parse_weights(settings.tenant_weights)
        )
        self.engine = Supervised(
            engine or make_engine(settings), settings.max_restarts, self, max_stall_s=settings.max_stall_s
        )
        self.boundary = Boundary(self.metrics, settings.max_streams, self.identity)
        self.boundary.tracing = self.tracing = tracing_of(settings, "loraplex")
        self.health = HealthServicer()
        self.interceptors: list[aio.ServerInterceptor] = [self.boundary]
        body = settings.max_message_mib * MEBIBYTE
        self.site = Site(self.interceptors, settings.host, body, settings.reports, self.identity)
        self.side_port = SidePort(
            self.metrics, alive=self._alive, ready=self._ready, identity=self.identity, site=self.site
        )
        self.admission = Admission(_rules(settings, self.identity), self.metrics)
        self.port = settings.port
        self.http_port = settings.http_port
        self._server: aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._starting = True
        self._prepared: Path | None = None
        self.generator: Generator | None = None
        self._spare = Spare(self.admission, settings.max_shadows)

    async def start(self) -> None:
        """Return when the server is ready. Raises BaseModelNotFound, BaseModelIncomplete, AddressInUse or others of ours."""
        started = time.monotonic()
        settings = self.settings
        check_base(settings.model)
        registry = Registry(Store.open(settings.registry))
        self._server = self._make_server()
        self._bind(self._server)
        await self._set_health(serving=False)
        await self._server.start()
        self.http_port = await self.side_port.start(settings.host, settings.http_port)
        base, _ = await asyncio.gather(
            asyncio.to_thread(read_base, settings.model, settings.cache / "fingerprints"), self.engine.start()
        )
        await self._add_services(registry, base)
        self._starting = False
        work = (
            self._refresh(), self._watch_engine(), self.trials.run(), self.activity.follow(self.catalog),
            self.identity.watch(), self.metrics.loop_lag.run(),
        )  # fmt: skip
        self._tasks = [asyncio.create_task(each) for each in work]
        self.boundary.ready = True
        await self._set_health(serving=True)
        seconds = round(time.monotonic() - started, 1)
        if settings.unprotected:
            log.warning("other machines reach this server unprotected: --allow-remote", missing=settings.unprotected)
        log.info("ready", address=f"{settings.host}:{self.port}", http_port=self.http_port, seconds=seconds)

    async def drain(self) -> None:
        """Take no new work and wait for what is in flight, `drain_s` at most."""
        log.info("draining", running=self.admission.running, waiting=self.admission.waiting)
        self.admission.drain()
        await self._set_health(serving=False)
        try:
            async with asyncio.timeout(self.settings.drain_s):
                await self.admission.until_idle()
        except TimeoutError:
            log.warning("drain limit reached", cut_short=self.admission.running + self.admission.waiting)

    async def stop(self) -> None:
        """Drain, then close the ports and stop the engine. Harmless when `start` failed half-way."""
        await self.drain()
        self.boundary.ready = False
        for task in self._tasks:
            task.cancel()
        await self._spare.stop()
        if self._server:
            await self._server.stop(grace=0.5)
        await self.side_port.stop()
        if self.generator:
            await self.generator.grammars.stop()
        await self.engine.stop()
        await self.identity.close()
        if self.tracing:
            await self.tracing.close()
        if self._prepared:
            shutil.rmtree(self._prepared, ignore_errors=True)
        log.info("stopped")

    def _make_server(self) -> aio.Server:
        settings = self.settings
        limit = settings.max_message_mib * MEBIBYTE
        options: Sequence[tuple[str, Any]] = (
            ("grpc.so_reuseport", 0),  # by default a second server would take half of this one's connections
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            *CONNECTIONS,
        )
        server = aio.server(interceptors=self.interceptors, options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if settings.reflection:
            names = [service.full_name for service in SERVICES]
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection([*names, health_name, reflection.SERVICE_NAME], server)
        return server

    def _bind(self, server: aio.Server) -> None:
        address = f"{self.settings.host}:{self.settings.port}"
        self.port = listen(server, address, self.identity.tls)

    async def _add_services(self, registry: Registry, base: Base) -> None:
        settings, server = self.settings, _Running(self._server, self.site.calls)
        if settings.require_signature:
            check_key(settings.require_signature)
        self.catalog = Catalog(registry)
        await self.catalog.refresh()
        residency = self._make_residency(registry, base)
        residency.on_full, residency.on_event = self._spare.clear, self._in_engine
        self.engine.keeper = residency
        moves = Moves(self.catalog, residency)
        self.trials = Trials(registry, self.catalog, residency, moves, f"server {socket.gethostname()}:{self.port}")
        shadows = Shadows(self.engine, self.catalog, residency, self._spare, self.metrics)
        observers: list[Observer] = [self.metrics, self.activity, self.trials]
        if self.tracing:
            observers.append(self.tracing)
        allowances = self.identity.allowances
        self.generator = Generator(self.engine, self.catalog, self.admission, residency, observers, shadows, allowances)
        self.metrics.watch(self.engine, self.admission, residency, self.catalog)
        limits = Limits(settings.max_rank, settings.max_adapter_mib * MEBIBYTE, settings.require_signature)
        adapters = AdapterService(
            registry, self.catalog, residency, moves, self.trials, shadows, base, limits, settings.max_publishing
        )
        generation = GenerationService(self.generator, self.metrics, base.fingerprint)
        engine = EngineService(self.generator, self.metrics, self.activity, self._ready, base, settings, self.http_port)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(engine, server)

    def engine_restarted(self, seconds: float) -> None:
        """The engine was replaced."""
        self.metrics.engine_restarted(seconds)
        self.activity.engine_restarted(seconds)

    def _in_engine(self, event: InEngine) -> None:
        self.metrics.in_engine(event)
        self.catalog.announce(event)

    def _make_residency(self, registry: Registry, base: Base) -> Residency:
        """The tiers, from the disk up."""
        settings, rates, evicted = self.settings, Rates(), self.metrics.adapter_evicted
        copies = LocalCopies(
            settings.cache / "adapters",
            registry,
            settings.require_signature,
            settings.disk_cache_mib * MEBIBYTE,
            rates,
            lambda: evicted("disk"),
        )
        limit = settings.host_memory_mib * MEBIBYTE
        self._prepared = shared_folder(settings.cache / "prepared", limit)
        memory = HostMemory(copies, self.engine.prepare, self._prepared, limit, rates, lambda: evicted("memory"))
        return Residency(
            self.engine,
            memory,
            base_fingerprint=base.fingerprint,
            capacity=settings.max_resident,
            load_timeout_s=settings.load_timeout_s,
            rates=rates,
            observer=self.metrics,
        )

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(service.full_name for service in SERVICES)):
            await self.health.set(name, status)

    async def _refresh(self) -> None:
        """Notice what other processes publish and promote."""
        while True:
            await asyncio.sleep(self.settings.refresh_s)
            await self.catalog.refresh()

    async def _watch_engine(self) -> None:
        """Say NOT_SERVING while the engine is gone, so that nothing is routed here until it is back."""
        said = True
        while True:
            await asyncio.sleep(_HEALTH_S)
            serving = self.engine.ready and not self.admission.draining
            if serving != said:
                said = serving
                await self._set_health(serving=serving)

    def _alive(self) -> bool:
        return self._starting or self.engine.alive

    def _ready(self) -> bool:
        return self.boundary.ready and self.engine.ready and not self.admission.draining


class _Running:
    """Adds services to a server that runs already, which gRPC allows for generic handlers only; and to the HTTP site."""

    def __init__(self, server: aio.Server | None, calls: InProcess) -> None:
        self._server = server
        self._calls = calls

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add the service."""
        self._calls.add_generic_rpc_handlers(handlers)
        if self._server:
            self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """A faster look-up that is closed once the server runs."""


def listen(server: aio.Server, address: str, tls: Tls | None) -> int:
    """Open a gRPC server's port, by TLS if there is any. Raises AddressInUse."""
    try:
        return server.add_secure_port(address, tls.credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUse(f"{address} (gRPC)") from error


def _rules(settings: Settings, identity: Identity) -> Rules:
    quotas = identity.quotas
    return Rules(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_waiting_per_tenant=settings.max_waiting_per_tenant,
        max_wait_s=settings.max_wait_s,
        max_wait_per_tenant_s=settings.max_wait_per_tenant_s or math.inf,
        max_adapter_wait_s=settings.max_adapter_wait_s,
        weights=quotas.weights if identity.on else parse_weights(settings.tenant_weights),
        waiting_limits=quotas.waiting_limits,
    )


def make_engine(settings: Settings) -> Engine:
    """The engine that the settings name."""
    if settings.engine == "fake":
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        return FakeEngine(context_length=settings.context_length or 2048, dtype=dtype)
    from engine.runtime.vllm.engine import VllmEngine

    return VllmEngine(settings, settings.model)


async def set_with_parent(stopping: asyncio.Event) -> None:
    """Set the event when the process that started this one is gone, if that asked for it (see END_WITH_PARENT)."""
    parent = os.environ.get(END_WITH_PARENT, "")
    while parent:
        await asyncio.sleep(_PARENT_S)
        if str(os.getppid()) != parent:
            log.warning("the process that started this one is gone: draining")
            stopping.set()
            return


async def serve(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT, then drain and stop it. Raises what `App.start` raises."""
    app = App(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    watching = asyncio.create_task(set_with_parent(stopping))
    starting = asyncio.create_task(app.start())
    waiting = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            gc.collect()
            gc.freeze()  # what the start has made stays: a collection that looks at all of it would make every stream wait
            await waiting
    finally:
        starting.cancel()
        waiting.cancel()
        watching.cancel()
        await asyncio.gather(starting, waiting, watching, return_exceptions=True)
        await app.stop()

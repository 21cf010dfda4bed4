"""The whole single-machine server: one engine, its adapters, and the ports they are reached by.

Start: check the model folder, open the ports (health says NOT_SERVING), start the engine, say SERVING.
While it runs: an engine that dies is restarted (runtime/supervised.py); health says NOT_SERVING meanwhile.
Stop: say NOT_SERVING, let in-flight requests and changes finish for a while, then end what is left with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
import socket
import time
from pathlib import Path

import structlog
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2_grpc, engine_pb2_grpc, generation_pb2_grpc
from engine.config import MEBIBYTE, Settings, parse_weights
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
from engine.server.grpc_server import Health, Running, listen, make_server
from engine.server.http import SidePort
from engine.server.identity import Identity
from engine.server.metrics import Metrics
from engine.server.moves import Moves
from engine.server.process_end import told_to_end
from engine.server.tracing import tracing_of
from engine.server.trials import Trials
from engine.server.web.site import Site

log = structlog.get_logger(__name__)

_HEALTH_S = 0.1  # between looks at the engine


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
        self.health = Health()
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
        self._server = make_server(
            self.interceptors,
            self.health,
            max_message_mib=settings.max_message_mib,
            reflected=settings.reflection,
        )
        self.port = listen(self._server, f"{settings.host}:{settings.port}", self.identity.tls)
        await self.health.tell(serving=False)
        await self._server.start()
        self.http_port = await self.side_port.start(settings.host, settings.http_port)
        base, _ = await asyncio.gather(
            asyncio.to_thread(read_base, settings.model, settings.cache / "fingerprints"), self.engine.start()
        )
        await self._add_services(registry, base)
        self._starting = False
        work = (
            self._refresh(), self._watch_engine(), self.trials.run(), self.activity.follow(self.catalog),
            self.residency.follow(self.catalog), self.identity.watch(), self.metrics.loop_lag.run(),
        )  # fmt: skip
        self._tasks = [asyncio.create_task(each) for each in work]
        self.boundary.ready = True
        await self.health.tell(serving=True)
        seconds = round(time.monotonic() - started, 1)
        if settings.unprotected:
            log.warning("other machines reach this server unprotected: --allow-remote", missing=settings.unprotected)
        log.info("ready", address=f"{settings.host}:{self.port}", http_port=self.http_port, seconds=seconds)

    async def drain(self) -> None:
        """Take no new work and wait for what is in flight, `drain_s` at most."""
        acts = self.boundary.acts
        log.info("draining", running=self.admission.running, waiting=self.admission.waiting, acts=acts.under_way)
        self.admission.drain()
        acts.drain()
        await self.health.tell(serving=False)
        try:
            async with asyncio.timeout(self.settings.drain_s):
                await self.admission.until_idle()
                await acts.until_idle()
        except TimeoutError:
            left = self.admission.running + self.admission.waiting + acts.under_way
            log.warning("drain limit reached", cut_short=left)

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

    async def _add_services(self, registry: Registry, base: Base) -> None:
        settings, server = self.settings, Running(self._server, self.site.calls)
        if settings.require_signature:
            check_key(settings.require_signature)
        self.catalog = Catalog(registry)
        await self.catalog.refresh()
        residency = self.residency = self._make_residency(registry, base)
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
                await self.health.tell(serving=serving)

    def _alive(self) -> bool:
        return self._starting or self.engine.alive

    def _ready(self) -> bool:
        return self.boundary.ready and self.engine.ready and not self.admission.draining


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


async def serve(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT, then drain and stop it. Raises what `App.start` raises."""
    app = App(settings)
    try:
        with told_to_end() as ending:
            await _start_and_wait(app, ending)
    finally:
        await app.stop()


async def _start_and_wait(app: App, ending: asyncio.Event) -> None:
    """Return when the process is to end, which may be before the server has started."""
    starting = asyncio.create_task(app.start())
    waiting = asyncio.create_task(ending.wait())
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
        await asyncio.gather(starting, waiting, return_exceptions=True)

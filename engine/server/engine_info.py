"""EngineService: what is served, within which limits, how busy it is and with whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import metadata

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.api.loraplex.v1 import engine_pb2_grpc
from engine.config import MEBIBYTE, Settings
from engine.registry.fingerprint import Base
from engine.runtime.generator import Generator
from engine.server.activity import Activity
from engine.server.call import Context
from engine.server.convert import duration
from engine.server.identity import Role, principal
from engine.server.metrics import Metrics


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """Answers from what the runtime knows at once."""

    def __init__(
        self,
        generator: Generator,
        metrics: Metrics,
        activity: Activity,
        ready: Callable[[], bool],
        base: Base,
        settings: Settings,
        http_port: int,
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._activity = activity
        self._ready = ready
        self._base = base
        self._settings = settings
        self._http_port = http_port

    async def GetEngine(self, request: pb.GetEngineRequest, context: Context) -> pb.GetEngineResponse:
        """Everything at once."""
        info = self._generator.engine.info
        return pb.GetEngineResponse(
            base=pb.BaseModel(name=self._base.name, fingerprint=self._base.fingerprint, dtype=self._base.dtype),
            limits=self._limits(),
            resident=self._residents(),
            load=self._load(),
            engine=info.description,
            server_version=metadata.version("loraplex"),
            fleet=self._settings.fleet,
            http_port=self._http_port,
            compute_dtype=info.dtype,
        )

    async def GetActivity(self, request: pb.GetActivityRequest, context: Context) -> pb.GetActivityResponse:
        """Who is being served."""
        return self._activity.snapshot(ready=self._ready(), viewer=principal())

    async def GetCaller(self, request: pb.GetCallerRequest, context: Context) -> pb.GetCallerResponse:
        """Who it is, by the policy that is in force."""
        who = principal()
        roles = [role for role in Role if who.may(role)]
        return pb.GetCallerResponse(identified=not who.trusted, tenant=who.tenant, roles=roles)

    def _limits(self) -> pb.Limits:
        settings, info = self._settings, self._generator.engine.info
        return pb.Limits(
            context_length=info.context_length,
            vocabulary_size=info.vocabulary_size,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_rank=settings.max_rank,
            max_resident=settings.max_resident,
            max_message_bytes=settings.max_message_mib * MEBIBYTE,
            max_adapter_bytes=settings.max_adapter_mib * MEBIBYTE,
        )

    def _residents(self) -> list[pb.ResidentAdapter]:
        now, sees = time.monotonic(), principal().sees
        return [
            pb.ResidentAdapter(
                name=resident.manifest.name,
                version=resident.manifest.version,
                digest=resident.manifest.digest,
                pinned=resident.pinned,
                in_use=resident.in_use,
                idle=duration(0 if resident.in_use else now - resident.last_used),
                rank=resident.manifest.rank,
            )
            for resident in self._generator.residency.residents()
            if sees(resident.manifest.name)
        ]

    def _load(self) -> pb.Load:
        admission = self._generator.admission
        return pb.Load(
            running=admission.running,
            waiting=admission.waiting,
            kv_cache_usage=self._generator.engine.load_now().kv_cache_usage,
            generated_tokens=self._metrics.generated_tokens,
            draining=admission.draining,
            waiting_tokens=admission.waiting_tokens,
            waiting_adapters=admission.waiting_adapters,
            restarting=not getattr(self._generator.engine, "ready", True),
            dead=not self._generator.engine.alive,
        )

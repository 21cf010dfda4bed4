"""EngineService of the router: the fleet as if it were one engine."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.api.loraplex.v1 import engine_pb2_grpc
from engine.cluster.fleet import Fleet
from engine.errors import NoReplica
from engine.server.boundary import Context

_SMALLEST = (
    "context_length", "vocabulary_size", "max_rank", "max_message_bytes", "max_adapter_bytes",
)  # fmt: skip
_SUMS = ("max_running", "max_waiting", "max_resident")


class Overview(engine_pb2_grpc.EngineServiceServicer):
    """Adds up what the replicas last said."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def GetEngine(self, request: pb.GetEngineRequest, context: Context) -> pb.GetEngineResponse:
        """Sums of loads and places, the least of all limits, and every adapter that is resident anywhere."""
        engines = [self._fleet.engines[link.address] for link in self._fleet.usable()]
        if not engines:
            raise NoReplica
        main = self._fleet.replicas.bases()[0]
        first = next(engine for engine in engines if engine.base.fingerprint == main)
        return pb.GetEngineResponse(
            base=first.base,
            limits=_limits(engines),
            resident=_residents(engines),
            load=_load(engines),
            engine=f"{len(engines)} of {len(self._fleet.links)} replicas: {first.engine}"[:128],
            server_version=metadata.version("loraplex"),
        )


def _limits(engines: list[pb.GetEngineResponse]) -> pb.Limits:
    least = {name: min(getattr(engine.limits, name) for engine in engines) for name in _SMALLEST}
    sums = {name: sum(getattr(engine.limits, name) for engine in engines) for name in _SUMS}
    return pb.Limits(**least, **sums)


def _load(engines: list[pb.GetEngineResponse]) -> pb.Load:
    loads = [engine.load for engine in engines]
    return pb.Load(
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads),
        kv_cache_usage=sum(load.kv_cache_usage for load in loads) / len(loads),
        generated_tokens=sum(load.generated_tokens for load in loads),
        waiting_tokens=sum(load.waiting_tokens for load in loads),
        waiting_adapters=max(load.waiting_adapters for load in loads),
    )


def _residents(engines: Iterable[pb.GetEngineResponse]) -> list[pb.ResidentAdapter]:
    found: dict[tuple[str, str], pb.ResidentAdapter] = {}
    for engine in engines:
        for one in engine.resident:
            known = found.setdefault((one.name, one.version), pb.ResidentAdapter())
            idle = min(known.idle.ToNanoseconds(), one.idle.ToNanoseconds()) if known.name else one.idle.ToNanoseconds()
            in_use, pinned = known.in_use + one.in_use, known.pinned or one.pinned
            known.CopyFrom(one)
            known.in_use, known.pinned = in_use, pinned
            known.idle.FromNanoseconds(idle)
    return [found[key] for key in sorted(found)]

"""EngineService of the router: the fleet as if it were one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from importlib import metadata

from grpc import aio

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.api.loraplex.v1 import engine_pb2_grpc
from engine.cluster.fleet import GET_ENGINE, Fleet
from engine.cluster.fleet.replies import answer_or_error, as_it_came
from engine.cluster.router.activity import together
from engine.cluster.router.metadata import passed_on
from engine.errors import NoReplica
from engine.server.call import Context

_GET_ACTIVITY = "/loraplex.v1.EngineService/GetActivity"
_GET_CALLER = "/loraplex.v1.EngineService/GetCaller"
_ASK = pb.GetEngineRequest().SerializeToString()
_TIMEOUT_S = 2.0
_SMALLEST = (
    "context_length", "vocabulary_size", "max_rank", "max_message_bytes", "max_adapter_bytes",
)  # fmt: skip
_SUMS = ("max_running", "max_waiting", "max_resident")


class Overview(engine_pb2_grpc.EngineServiceServicer):
    """Adds up what the replicas last said, or with `ask` what they tell this very caller."""

    def __init__(self, fleet: Fleet, *, ask: bool = False) -> None:
        self._fleet = fleet
        self._ask = ask

    async def GetEngine(self, request: pb.GetEngineRequest, context: Context) -> pb.GetEngineResponse:
        """Sums of loads and places, the least of all limits, and every adapter that is resident anywhere."""
        engines = await self._engines(context)
        if not engines:
            raise NoReplica
        main = self._fleet.replicas.bases()[:1]  # none, if those who answered get no requests any more
        first = next((engine for engine in engines if engine.base.fingerprint in main), engines[0])
        dtypes = {engine.compute_dtype for engine in engines if engine.base.fingerprint == first.base.fingerprint}
        return pb.GetEngineResponse(
            base=first.base,
            limits=_limits(engines),
            resident=_residents(engines),
            load=_load(engines),
            engine=f"{len(engines)} of {len(self._fleet.links)} replicas: {first.engine}"[:128],
            server_version=metadata.version("loraplex"),
            compute_dtype=", ".join(sorted(dtypes - {""})),  # old servers do not tell
        )

    async def _engines(self, context: Context) -> list[pb.GetEngineResponse]:
        if not self._ask:
            return [self._fleet.engines[link.address] for link in self._fleet.usable()]
        answers = await self._everybody(GET_ENGINE, _ASK, context)
        return [pb.GetEngineResponse.FromString(answer) for answer in answers]

    async def GetActivity(self, request: pb.GetActivityRequest, context: Context) -> pb.GetActivityResponse:
        """What each replica tells this caller of itself, put together."""
        answers = await self._everybody(_GET_ACTIVITY, request.SerializeToString(), context)
        if not answers:
            raise NoReplica
        return together([pb.GetActivityResponse.FromString(answer) for answer in answers])

    async def GetCaller(self, request: pb.GetCallerRequest, context: Context) -> pb.GetCallerResponse:
        """Whom the replicas take the caller for: they have one policy."""
        answers = await self._everybody(_GET_CALLER, b"", context)
        if not answers:
            raise NoReplica
        return pb.GetCallerResponse.FromString(answers[0])

    async def _everybody(self, method: str, data: bytes, context: Context) -> list[bytes]:
        """The answers of all replicas that answer; if all refuse, that is this call's end, too."""
        theirs = passed_on(context)
        links = self._fleet.usable()
        calls = (link.unary(method)(data, timeout=_TIMEOUT_S, metadata=theirs) for link in links)
        answers = await asyncio.gather(*map(answer_or_error, calls))
        good = [answer for answer in answers if isinstance(answer, bytes)]
        refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
        if refused and not good:
            await context.abort(*as_it_came(refused[0]))
        return good


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

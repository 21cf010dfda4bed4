"""A scripted server: real gRPC, made-up answers, one planted fault if wanted. It writes down what it really sent, and when."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from engine.api.loraplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)

_NEAR_TIE = 5  # the place in every answer where the second token is nearly as likely as the first
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"

FAULTS = (
    "misroute", "stale", "garbage", "drift", "wrong_adapter", "wrong_version", "wrong_digest", "switched", "lost",
    "duplicated", "reordered", "truncated", "miscounted", "short", "error", "broken", "hang", "freeze",
)  # fmt: skip


@dataclass
class Script:
    """What the server does. Times are in seconds; `fault` happens to the `fault_at`-th stream (canaries only, if they must)."""

    adapters: dict[str, list[str]] = field(
        default_factory=lambda: {name: ["v1", "v2"] for name in ("ada", "bob", "cy")}
    )
    ttft_s: tuple[float, ...] = (0.02,)
    gap_s: float = 0.0
    bundle: int = 1
    fault: str = ""
    fault_at: int = 3
    freeze_s: float = 0.5
    error_share: float = 0.0
    canary_prompts: tuple[str, ...] = ()


@dataclass
class Log:
    """When the server sent the messages with tokens of one request, by time.monotonic."""

    sent: list[float] = field(default_factory=list)
    received: float = 0.0


def tokens(who: str, prompt: str, count: int) -> list[int]:
    """The answer of "name@version" (or "" for the base): depends on who and what, and on nothing else."""
    stream = hashlib.shake_128(f"{who}\n{prompt}".encode()).digest(count)
    return list(stream)


def digest(who: str) -> str:
    """The digest of a version."""
    return f"sha256:{hashlib.sha256(who.encode()).hexdigest()}"


class ScriptedServer:
    """All of it on one port. `script` may be replaced while it runs."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.current = {name: versions[0] for name, versions in script.adapters.items()}
        self.before: dict[str, str] = {}
        self.logs: list[Log] = []
        self.streams = 0
        self.frozen_until = 0.0
        self.in_use: set[str] = set()
        """Adapters that it refuses to unload."""
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> str:
        """Listen on a free port of loopback; returns the address."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(self), server)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(_Engine(self), server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(_Adapters(self), server)
        server.add_generic_rpc_handlers((_Health(),))
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._server = server
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Stop at once."""
        if self._server:
            await self._server.stop(None)

    def reset(self, script: Script) -> None:
        """Begin again with another script."""
        self.script = script
        self.current = {name: versions[0] for name, versions in script.adapters.items()}
        self.before, self.logs, self.streams, self.frozen_until = {}, [], 0, 0.0

    def resolve(self, ref: str) -> str:
        """Who answers a reference: "name@version", or "" for the base."""
        name, _, version = ref.partition("@")
        return f"{name}@{version or self.current[name]}" if name else ""

    def another(self, who: str) -> str:
        """Somebody else, of another name."""
        name = next(name for name in self.script.adapters if name != who.partition("@")[0])
        return f"{name}@{self.current[name]}"

    def fault(self, prompt: str, who: str) -> str:
        """The fault of this stream: the planted one, once, on a stream where it can show."""
        script = self.script
        if script.fault in ("misroute", "stale", "garbage", "drift") and prompt not in script.canary_prompts:
            return ""
        if script.fault in ("wrong_version", "wrong_digest", "stale") and not who:  # the base has neither
            return ""
        self.streams += 1
        return script.fault if self.streams == script.fault_at else ""


def _resolved(who: str, *, wrong_digest: bool = False) -> generation_pb2.ResolvedAdapter:
    name, _, version = who.partition("@")
    mark = digest(who + "?" if wrong_digest else who) if who else ""
    return generation_pb2.ResolvedAdapter(name=name, version=version, digest=mark, base_fingerprint=digest("base"))


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._turn = itertools.count()

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - gRPC's signature
        who = self._server.resolve(request.adapter)
        ids = tokens(who, request.text, request.sampling.max_tokens)
        logprobs = [_logprobs(token, place) for place, token in enumerate(ids)]
        completion = generation_pb2.Completion(token_ids=ids, logprobs=logprobs, finish_reason="FINISH_REASON_LENGTH")
        return generation_pb2.GenerateResponse(completions=[completion], adapter=_resolved(who), usage=_usage(len(ids)))

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        log = Log(received=time.monotonic())
        self._server.logs.append(log)
        asked, script, turn = request.request, self._server.script, next(self._turn)
        who = self._server.resolve(asked.adapter)
        fault = self._server.fault(asked.text, who)
        if fault == "freeze":
            self._server.frozen_until = time.monotonic() + script.freeze_s
        if fault == "error" or (turn * 0.618) % 1 < script.error_share:  # evenly spread, without chance
            await context.abort(grpc.StatusCode.INTERNAL, "planted")
        await self._pause(log.received + script.ttft_s[turn % len(script.ttft_s)] - time.monotonic())
        messages = _messages(asked, who, fault, self._server)
        for number, message in enumerate(messages):
            if number:
                await self._pause(script.gap_s)
            if number == len(messages) // 2:
                await _interrupt(fault, context)
            if message.token_ids:
                log.sent.append(time.monotonic())
            yield message

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)
        if (left := self._server.frozen_until - time.monotonic()) > 0:
            await asyncio.sleep(left)


async def _interrupt(fault: str, context: Any) -> None:
    if fault == "broken":
        await context.abort(grpc.StatusCode.UNAVAILABLE, "planted")
    if fault == "hang":
        await asyncio.sleep(3600)


def _messages(asked: Any, who: str, fault: str, server: ScriptedServer) -> list[Any]:
    """All messages of an answer, with the fault in them."""
    ids = _answer(asked, who, fault, server)
    size = server.script.bundle
    messages = [
        generation_pb2.GenerateStreamResponse(sequence=number, token_ids=ids[at : at + size])
        for number, at in enumerate(range(0, len(ids), size))
    ]
    said = {"wrong_adapter": server.another(who), "wrong_version": f"{who.partition('@')[0]}@v9"}.get(fault, who)
    messages[0].adapter.CopyFrom(_resolved(said, wrong_digest=fault == "wrong_digest"))
    last = messages[-1]
    last.usage.CopyFrom(_usage(len(ids) + (fault == "miscounted")))
    last.timings.time_to_first_token.FromMicroseconds(int(server.script.ttft_s[0] * 1e6))
    middle = len(messages) // 2
    match fault:
        case "switched":
            messages[middle].adapter.CopyFrom(_resolved(server.another(who)))
        case "lost":
            del messages[middle]
        case "duplicated":
            messages.insert(middle, messages[middle])
        case "reordered":
            messages[middle - 1], messages[middle] = messages[middle], messages[middle - 1]
        case "truncated":
            del messages[-1]
    return messages


def _answer(asked: Any, who: str, fault: str, server: ScriptedServer) -> list[int]:
    count = asked.sampling.max_tokens - (fault == "short")
    ids = tokens(who, asked.text, count)
    match fault:
        case "misroute":
            return tokens(server.another(who), asked.text, count)
        case "stale":
            name, _, version = who.partition("@")
            other = next(one for one in server.script.adapters[name] if one != version)
            return tokens(f"{name}@{other}", asked.text, count)
        case "garbage":
            return tokens("nobody", asked.text, count)
        case "drift":
            return [*ids[:_NEAR_TIE], *tokens("drift", asked.text, count - _NEAR_TIE)]
    return ids


def _usage(completion_tokens: int) -> generation_pb2.Usage:
    return generation_pb2.Usage(prompt_tokens=4, completion_tokens=completion_tokens)


def _logprobs(token: int, place: int) -> generation_pb2.TokenLogprobs:
    best = generation_pb2.TokenLogprob(token_id=token, logprob=-0.1)
    second = generation_pb2.TokenLogprob(token_id=(token + 1) % 256, logprob=-0.11 if place == _NEAR_TIE else -4.0)
    return generation_pb2.TokenLogprobs(token=best, top=[best, second])


class _Engine(engine_pb2_grpc.EngineServiceServicer):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    async def GetEngine(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        limits = engine_pb2.Limits(context_length=4096, vocabulary_size=256, max_running=16, max_resident=8)
        base = engine_pb2.BaseModel(name="scripted", fingerprint=digest("base"))
        return engine_pb2.GetEngineResponse(base=base, limits=limits, engine="scripted")


class _Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    def _summary(self, name: str) -> Any:
        aliases = {"current": self._server.current[name]}
        return adapters_pb2.AdapterSummary(name=name, aliases=aliases, versions=self._server.script.adapters[name])

    async def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self._summary(name) for name in self._server.script.adapters]
        )

    async def GetAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        name = request.name
        versions = [
            adapters_pb2.AdapterVersion(name=name, version=version, digest=digest(f"{name}@{version}"), rank=8)
            for version in self._server.script.adapters[name]
        ]
        return adapters_pb2.GetAdapterResponse(adapter=self._summary(name), versions=versions)

    async def SetAlias(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802, ARG002
        self._server.before[request.name] = self._server.current[request.name]
        self._server.current[request.name] = request.version
        yield adapters_pb2.SetAliasResponse(change=adapters_pb2.AliasChange(alias="current", version=request.version))

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        name = request.adapter
        if name in self._server.in_use:
            refusal = status_pb2.Status(code=9, message=f"{name} is in use")
            refusal.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_ALLOWED_NOW"))
            context.set_trailing_metadata((("grpc-status-details-bin", refusal.SerializeToString()),))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal.message)
        if name not in self._server.script.adapters:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no {name}")
        return adapters_pb2.UnloadAdapterResponse(was_resident=True)

    async def RollbackAlias(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        name = request.name
        if name not in self._server.before:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "there is nothing before")
        back = self._server.before[name]
        self._server.before[name], self._server.current[name] = self._server.current[name], back
        yield adapters_pb2.RollbackAliasResponse(change=adapters_pb2.AliasChange(alias="current", version=back))


class _Health(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:
        """Always serving."""
        if handler_call_details.method != _HEALTH_CHECK:
            return None

        async def check(request: bytes, context: Any) -> bytes:  # noqa: ARG001
            return _SERVING

        return grpc.unary_unary_rpc_method_handler(check)

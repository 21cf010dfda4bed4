"""The outermost interceptor: what every call goes through, whatever the service.

It gives the call a request id, refuses it while the server is not ready, asks who calls and whether they may, reads and
checks its messages, and turns every error into one of ours; nothing else leaves the server. It also counts and logs the call.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Protocol

import grpc
import structlog
from grpc import aio

from engine.errors import Draining, InternalError, LoraplexError, NotReady, Overloaded, QuotaExceeded, Stalled
from engine.server import stalls
from engine.server.acts import Acts
from engine.server.call import Call, Context
from engine.server.identity import Identity, Principal, act_as
from engine.server.identity.rights import check_role, need_of
from engine.server.status import code_of, message_of, trailers_of
from engine.server.tracing import Tracing

log = structlog.get_logger("loraplex.call")

_OURS = "/loraplex.v1."
_MOST_OTHER_STREAMS = 256  # gRPC's own services need no credentials, and a stream of theirs stays open
_FREQUENT = ("GetEngine", "GetActivity")  # routers and consoles ask all the time


class CallObserver(Protocol):
    """Counts calls."""

    def call(self, method: str, code: str, seconds: float) -> None:
        """A call has ended."""


class Boundary(aio.ServerInterceptor):
    """Wraps every handler. Set `ready` once the engine can generate, and `draining` when no more calls are to come.

    Without `identity` nobody is asked who they are.
    """

    def __init__(self, metrics: CallObserver, max_calls: int, identity: Identity | None = None) -> None:
        self.ready = False
        self.draining = False
        self.tracing: Tracing | None = None
        self.acts = Acts()
        self._metrics = metrics
        self._identity = identity
        self._limits = {"ours": max_calls, "streams": _MOST_OTHER_STREAMS, "checks": math.inf}
        self._max_of_a_tenant = max(1, max_calls // 2)  # so that others get through
        self._open: Counter[str] = Counter()  # by kind, and by tenant
        self._stalls = stalls.Stalls()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with the boundary around it."""
        method = str(handler_call_details.method)
        if method.startswith(_OURS) and (self.draining or not self.ready):
            return self._closed(method)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC answers UNIMPLEMENTED
        return self._wrapped(handler, method)

    def _closed(self, method: str) -> Any:
        """A handler that refuses calls of any kind: the services do not exist before the engine does, or are about to end."""

        async def refuse(_: bytes, context: Context) -> None:
            async with self._call(method, context, "ours"):
                raise Draining if self.draining else NotReady

        return grpc.unary_unary_rpc_method_handler(refuse)

    def _wrapped(self, handler: Any, method: str) -> Any:
        """A handler of the same kind that takes raw bytes: gRPC's own parsing would answer UNKNOWN on malformed ones."""
        read, write = handler.request_deserializer, handler.response_serializer
        ours = method.startswith(_OURS)

        async def unary(data: bytes, context: Context) -> Any:
            async with self._call(method, context, "ours" if ours else "checks") as call:
                return await handler.unary_unary(call.read(read, data), context)

        async def stream(data: bytes, context: Context) -> AsyncIterator[Any]:
            async with self._call(method, context, "ours" if ours else "streams") as call:
                result = handler.unary_stream(call.read(read, data), context)
                if inspect.isawaitable(result):  # gRPC's own health service writes to the context instead of yielding
                    await result
                    return
                async with aclosing(result) as responses:
                    async for response in responses:
                        self._stalls.writes(call)
                        yield response
                        self._stalls.wrote(call)

        async def both(chunks: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async with self._call(method, context, "ours" if ours else "streams") as call:
                requests = _read_all(call, read, chunks)
                async with aclosing(handler.stream_stream(requests, context)) as responses:
                    async for response in responses:
                        self._stalls.writes(call)
                        yield response
                        self._stalls.wrote(call)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(both, None, write)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, write)
        return grpc.unary_unary_rpc_method_handler(unary, None, write)

    @asynccontextmanager
    async def _call(self, method: str, context: Context, kind: str) -> AsyncIterator[Call]:
        call = Call(method, context)
        call.task = asyncio.current_task()
        if self.tracing and method.startswith(_OURS) and not method.endswith(_FREQUENT):
            call.follow(self.tracing.begin(method, context.invocation_metadata()))
        self._open[kind] += 1
        try:
            if self._open[kind] > self._limits[kind]:
                raise Overloaded(self._open[kind] - 1, "calls are open")
            if self._identity:
                await self._admit(call, self._identity)
            with self._counted(call.principal), self.acts.counted(call.need):
                yield call
        except LoraplexError as error:
            await self._refuse(call, error)
        except (asyncio.CancelledError, GeneratorExit):
            call.code = "CANCELLED"
            raise
        except aio.AbortError:
            call.code = str(getattr(context.code(), "name", context.code()))
            raise
        except Exception:
            if context.done():  # the caller left while a message was being written to it
                call.code = "CANCELLED"
                return
            log.exception("bug", method=method, request_id=call.request_id)
            await self._refuse(call, InternalError(call.request_id))
        finally:
            self._open[kind] -= 1
            self._stalls.wrote(call)
            await self._finish(call)

    @contextmanager
    def _counted(self, principal: Principal | None) -> Iterator[None]:
        """One more call of a tenant. Raises QuotaExceeded if it has half of all."""
        if principal is None:
            yield
            return
        key = f"tenant {principal.tenant}"
        if self._open[key] >= self._max_of_a_tenant:
            raise QuotaExceeded(principal.tenant, f"has {self._open[key]} calls open, half of what there may be", 1.0)
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    async def _admit(self, call: Call, identity: Identity) -> None:
        """Find out who calls, and refuse what they may not do whatever the message says."""
        call.need = need_of(call.method)
        call.principal = await identity.of_call(call.method, call.context)
        if call.principal is None:
            return
        act_as(call.principal)
        call.facts |= {"tenant": call.principal.tenant, "credential": call.principal.credential}
        if call.need:
            check_role(call.need, call.principal)

    async def _refuse(self, call: Call, error: LoraplexError) -> None:
        if call.principal:
            error = call.principal.shown(error)
        call.reason = error.reason
        call.code = code_of(error).name
        call.facts["problem"] = message_of(error)
        await self._record(call)
        await call.context.abort(code_of(error), message_of(error), trailers_of(error, call.request_id))

    async def _finish(self, call: Call) -> None:
        if not call.method.startswith(_OURS):
            return
        if self.tracing and call.span:
            self.tracing.end(call.span, call.code, call.request_id)
        method = call.method.rpartition("/")[2]
        seconds = time.monotonic() - call.started
        self._metrics.call(method, call.code, seconds)
        facts = {"method": method, "code": call.code, "seconds": round(seconds, 4)} | call.facts
        tell = log.debug if method in _FREQUENT and call.code == "OK" else log.info
        tell("call", request_id=call.request_id, **facts)
        await self._record(call)

    async def _record(self, call: Call) -> None:
        """Write an act down, once, and before the caller is told how it ended: a server that stops then loses no line."""
        identity = self._identity
        if call.recorded or not (identity and call.need and call.need.audited and (call.principal or not identity.on)):
            return
        call.recorded = True
        await identity.record(call.principal, call.method.rpartition("/")[2], call.code, **call.audit())


async def _read_all(
    call: Call, read: Callable[[bytes], Any] | None, chunks: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    """A stream's messages. Touches `chunks` only when asked for one: gRPC warns about a stream begun and never read."""
    coming = aiter(chunks)
    while True:
        try:
            async with asyncio.timeout(stalls.STALLED_S):
                data = await anext(coming)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Stalled(stalls.STALLED_S) from None
        yield call.read(read, data)

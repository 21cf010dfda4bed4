"""The outermost interceptor: what every call goes through, whatever the service.

It gives the call a request id, refuses it while the server is not ready, reads and checks its messages, and turns every
error into one of ours; nothing else leaves the server. It also counts and logs the call.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

import grpc
import structlog
from grpc import aio

from engine.errors import InternalError, LoraplexError, NotReady, Overloaded
from engine.server.status import code_of, message_of, trailers_of
from engine.server.validation import parse

log = structlog.get_logger("loraplex.call")

_OURS = "/loraplex.v1."
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")

Context = aio.ServicerContext[Any, Any]


class CallObserver(Protocol):
    """Counts calls."""

    def call(self, method: str, code: str, seconds: float) -> None:
        """A call has ended."""


class Boundary(aio.ServerInterceptor):
    """Wraps every handler. Set `ready` once the engine can generate."""

    def __init__(self, metrics: CallObserver, max_calls: int) -> None:
        self.ready = False
        self._metrics = metrics
        self._max_calls = max_calls
        self._calls = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with the boundary around it."""
        method = str(handler_call_details.method)
        if method.startswith(_OURS) and not self.ready:
            return self._closed(method)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC answers UNIMPLEMENTED
        return self._wrapped(handler, method)

    def _closed(self, method: str) -> Any:
        """A handler that refuses calls of any kind: the services do not exist before the engine does."""

        async def refuse(_: bytes, context: Context) -> None:
            async with self._call(method, context):
                raise NotReady

        return grpc.unary_unary_rpc_method_handler(refuse)

    def _wrapped(self, handler: Any, method: str) -> Any:
        """A handler of the same kind that takes raw bytes: gRPC's own parsing would answer UNKNOWN on malformed ones."""
        read, write = handler.request_deserializer, handler.response_serializer

        async def unary(data: bytes, context: Context) -> Any:
            async with self._call(method, context) as call:
                return await handler.unary_unary(call.read(read, data), context)

        async def stream(data: bytes, context: Context) -> AsyncIterator[Any]:
            async with self._call(method, context) as call:
                result = handler.unary_stream(call.read(read, data), context)
                if inspect.isawaitable(result):  # gRPC's own health service writes to the context instead of yielding
                    await result
                    return
                async with aclosing(result) as responses:
                    async for response in responses:
                        yield response

        async def both(chunks: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async with self._call(method, context) as call:
                requests = _read_all(call, read, chunks)
                async with aclosing(handler.stream_stream(requests, context)) as responses:
                    async for response in responses:
                        yield response

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(both, None, write)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, write)
        return grpc.unary_unary_rpc_method_handler(unary, None, write)

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[Call]:
        call = Call(method, context)
        self._calls += 1
        try:
            if method.startswith(_OURS) and self._calls > self._max_calls:
                raise Overloaded(self._calls, "calls are open")
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
            self._calls -= 1
            self._finish(call)

    async def _refuse(self, call: Call, error: LoraplexError) -> None:
        call.code = code_of(error).name
        call.facts["problem"] = error.message
        await call.context.abort(code_of(error), message_of(error), trailers_of(error, call.request_id))

    def _finish(self, call: Call) -> None:
        if not call.method.startswith(_OURS):
            return
        method = call.method.rpartition("/")[2]
        seconds = time.monotonic() - call.started
        self._metrics.call(method, call.code, seconds)
        facts = {"method": method, "code": call.code, "seconds": round(seconds, 4)} | call.facts
        log.info("call", request_id=call.request_id, **facts)


class Call:
    """One call: its id, and what is logged about it at its end."""

    def __init__(self, method: str, context: Context) -> None:
        self.method = method
        self.context = context
        self.started = time.monotonic()
        self.code = "OK"
        self.facts: dict[str, Any] = {}
        self.request_id = _given_id(context) or uuid.uuid4().hex
        self._bind()

    def read(self, deserializer: Callable[[bytes], Any] | None, data: bytes) -> Any:
        """Parse and check a message; a request id inside it becomes the call's."""
        request = parse(deserializer, data)
        inner = getattr(request, "request", request)
        if given := getattr(inner, "request_id", ""):
            self.request_id = given
            self._bind()
        if adapter := getattr(inner, "adapter", ""):
            self.facts["adapter"] = adapter
        if labels := getattr(inner, "labels", None):
            self.facts["labels"] = dict(labels)
        return request

    def _bind(self) -> None:
        structlog.contextvars.bind_contextvars(request_id=self.request_id)


async def _read_all(
    call: Call, read: Callable[[bytes], Any] | None, chunks: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    """A stream's messages. Touches `chunks` only when asked for one: gRPC warns about a stream begun and never read."""
    async for data in chunks:
        yield call.read(read, data)


def request_id() -> str:
    """The id of the call that is being handled."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def _given_id(context: Context) -> str:
    """A well-formed x-request-id of the caller's metadata, else nothing."""
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return ""

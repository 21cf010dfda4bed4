"""Calling the gRPC services from HTTP, without a socket but through the very same interceptors.

So a second front end cannot lose a check of the first: messages are validated, callers identified, calls counted, logged and
bounded in one place, and whatever a gRPC caller may not do, nobody may do over HTTP.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from aiohttp import web
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from engine.errors import LoraplexError, NotReady
from engine.server.web.refusal import Refused, of, read

# HTTP headers that mean in a call's metadata what they mean here; no others get there.
PASSED_ON = ("authorization", "x-request-id", "traceparent", "tracestate", "x-loraplex-tenant")
# What metadata cannot carry, and a router could not send on: a ? takes its place, which makes no wrong credential right.
_NOT_CARRIED = re.compile(r"[^ -~]")


@dataclass(frozen=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


class HttpContext:
    """What the services and interceptors ask of a gRPC context, answered from an HTTP request."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._code: grpc.StatusCode | None = None
        self.metadata = tuple(
            (key, _NOT_CARRIED.sub("?", value)) for key in PASSED_ON for value in request.headers.getall(key, ())
        )

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers that are passed on."""
        return self.metadata

    def time_remaining(self) -> float | None:
        """HTTP has no deadline: a client that does not want to wait any more hangs up, which cancels the call."""
        return None

    def peer(self) -> str:
        """The caller's address, as gRPC writes it."""
        name = self._request.transport.get_extra_info("peername") if self._request.transport else None
        if not name:
            return "unknown"
        return f"ipv6:[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"ipv4:{name[0]}:{name[1]}"

    @property
    def credentials(self) -> tuple[bytes, ...]:
        """What the caller shows of itself, proved or not."""
        shown = (value.encode() for key, value in self.metadata if key == "authorization")
        return (*shown, b"", *self.auth_context().get("x509_pem_cert", ()))

    def auth_context(self) -> dict[str, list[bytes]]:
        """The caller's verified certificate, by gRPC's name for it; empty without one."""
        transport = self._request.transport
        connection = transport.get_extra_info("ssl_object") if transport else None
        certificate = connection.getpeercert(binary_form=True) if connection else None
        return {"x509_pem_cert": [ssl.DER_cert_to_PEM_cert(certificate).encode()]} if certificate else {}

    def code(self) -> grpc.StatusCode | None:
        """The status that the call was ended with."""
        return self._code

    def done(self) -> bool:
        """Whether the caller has left."""
        return self._request.transport is None or self._request.transport.is_closing()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """End the call: raises Refused."""
        self._code = code
        raise Refused(read(code, details, trailing_metadata))

    def set_code(self, code: grpc.StatusCode) -> None:
        """What a service that lacks the method does before it raises."""
        self._code = code

    def set_details(self, details: str) -> None:
        """The same."""

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Nobody reads it here."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Nobody reads it here."""


class InProcess:
    """A gRPC server's services and interceptors, to be called from the same process."""

    def __init__(self, interceptors: Sequence[aio.ServerInterceptor]) -> None:
        self._interceptors = interceptors
        self._services: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add a service, as to a gRPC server."""
        self._services += handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """The same once more, for a faster look-up that is not needed here."""

    async def unary(self, request: web.Request, method: Any, message: Message) -> Any:
        """The one answer to `message`. Raises Refused."""
        async with aclosing(self.stream(request, method, message)) as answers:
            async for answer in answers:
                return answer
        raise RuntimeError(f"{method.full_name} ended without an answer")

    async def stream(self, request: web.Request, method: Any, message: Message) -> AsyncGenerator[Any, None]:
        """The answers to `message`, given its method's descriptor; closing the iterator cancels the call. Raises Refused."""
        context = HttpContext(request)
        details = _Details(f"/{method.containing_service.full_name}/{method.name}", context.metadata)
        try:
            handler = await self._handler(details)
            data = message.SerializeToString()
            if handler.response_streaming:
                async with aclosing(handler.unary_stream(data, context)) as answers:
                    async for answer in answers:
                        yield _parsed(method, answer)
            else:
                yield _parsed(method, await handler.unary_unary(data, context))
        except LoraplexError as error:  # raised outside of the boundary, by an interceptor
            raise Refused(of(error)) from error

    async def _handler(self, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler with every interceptor around it, first one outermost."""

        async def service(asked: grpc.HandlerCallDetails) -> Any:
            return next(filter(None, (each.service(asked) for each in self._services)), None)

        chain: Callable[[grpc.HandlerCallDetails], Awaitable[Any]] = service
        for interceptor in reversed(self._interceptors):
            chain = _around(interceptor, chain)
        handler = await chain(details)
        if handler is None:
            raise NotReady  # the services are added when the engine is there
        return handler


def _around(
    interceptor: aio.ServerInterceptor, inner: Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
) -> Callable[[grpc.HandlerCallDetails], Awaitable[Any]]:
    async def call(details: grpc.HandlerCallDetails) -> Any:
        return await interceptor.intercept_service(inner, details)

    return call


def _parsed(method: Any, answer: Any) -> Any:
    """A router's services pass bytes on."""
    return GetMessageClass(method.output_type).FromString(answer) if isinstance(answer, bytes) else answer

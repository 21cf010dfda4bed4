"""The gRPC server that a server and a router open alike: how connections are kept, health, reflection, the port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.api.loraplex.v1 import adapters_pb2, engine_pb2, generation_pb2
from engine.config import MEBIBYTE
from engine.errors import AddressInUse
from engine.server.identity.tls import Tls
from engine.server.web.inprocess import InProcess

SERVICES = (
    *generation_pb2.DESCRIPTOR.services_by_name.values(),
    *adapters_pb2.DESCRIPTOR.services_by_name.values(),
    *engine_pb2.DESCRIPTOR.services_by_name.values(),
)
_NAMES = tuple(service.full_name for service in SERVICES)
_HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_CONNECTIONS = (
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


class Health(health.aio.HealthServicer):
    """gRPC's health service, which says the same of all services and of the server as a whole."""

    async def tell(self, *, serving: bool) -> None:
        """Say SERVING or NOT_SERVING from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in (health.OVERALL_HEALTH, *_NAMES):
            await self.set(name, status)


def make_server(
    interceptors: Sequence[aio.ServerInterceptor],
    health_service: Health,
    *,
    max_message_mib: int,
    reflected: bool,
    share_port: bool = False,
) -> aio.Server:
    """A server that answers about health, and if `reflected` about its services, but has none of ours and no port yet.

    Unless `share_port`, nobody else can listen there: by default a second server would take half of this one's connections.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.max_receive_message_length", max_message_mib * MEBIBYTE),
        ("grpc.max_send_message_length", -1),
        *_CONNECTIONS,
    ]
    server = aio.server(interceptors=interceptors, options=options)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    if reflected:
        reflection.enable_server_reflection([*_NAMES, _HEALTH_NAME, reflection.SERVICE_NAME], server)
    return server


def listen(server: aio.Server, address: str, tls: Tls | None) -> int:
    """Open a gRPC server's port, by TLS if there is any. Raises AddressInUse."""
    try:
        return server.add_secure_port(address, tls.credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUse(f"{address} (gRPC)") from error


class Running:
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

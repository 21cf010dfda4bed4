"""A server on a real socket that does what a test tells it to, and a client connected to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import (
    adapters_pb2_grpc,
    engine_pb2_grpc,
    generation_pb2_grpc,
)
from engine.client import AsyncClient

_REGISTER = (
    (generation_pb2_grpc.GenerationServiceServicer, generation_pb2_grpc.add_GenerationServiceServicer_to_server),
    (adapters_pb2_grpc.AdapterServiceServicer, adapters_pb2_grpc.add_AdapterServiceServicer_to_server),
    (engine_pb2_grpc.EngineServiceServicer, engine_pb2_grpc.add_EngineServiceServicer_to_server),
)

Serve = Callable[..., Awaitable[str]]
Connect = Callable[..., Awaitable[AsyncClient]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server with the given servicers; returns its address."""
    servers: list[grpc.aio.Server] = []

    async def start(*services: Any, handlers: tuple[grpc.GenericRpcHandler, ...] = ()) -> str:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(handlers)
        for service in services:
            for kind, register in _REGISTER:
                if isinstance(service, kind):
                    register(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


@pytest.fixture
async def connect(serve: Serve) -> AsyncIterator[Connect]:
    """Starts a server with the given servicers and connects a client to it, which takes the keywords."""
    clients: list[AsyncClient] = []

    async def start(*services: Any, handlers: tuple[grpc.GenericRpcHandler, ...] = (), **options: Any) -> AsyncClient:
        client = AsyncClient(await serve(*services, handlers=handlers), **options)
        clients.append(client)
        return client

    yield start
    for client in clients:
        await client.close()

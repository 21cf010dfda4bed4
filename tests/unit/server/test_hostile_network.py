"""Connections that mean no good: many, slow, silent, oversized, reset at once. Everybody else is served on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest

from engine.api.loraplex.v1 import engine_pb2, generation_pb2
from engine.client.testing import FakeServer
from tests.unit.server.conftest import Stubs, ask, ask_stream, refused, stubs_to, until

pytestmark = pytest.mark.slow

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def _answered(server: FakeServer) -> None:
    """Another caller, on a connection of its own, gets its answer."""
    async with stubs_to(server.target) as stubs:
        answer: generation_pb2.GenerateResponse = await stubs.generation.Generate(ask(), timeout=10)
    assert answer.completions[0].text == "base heard: hi"


@pytest.mark.parametrize("said", [b"", _PREFACE[:5], _PREFACE, b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=len)
@pytest.mark.parametrize("port", ["gRPC", "HTTP"])
async def test_connections_that_say_little(server: FakeServer, port: str, said: bytes) -> None:
    """Hundreds of connections that stop in the middle of their first words cost nobody an answer."""
    number = server.app.port if port == "gRPC" else server.app.http_port
    async with AsyncExitStack() as stack:
        for _ in range(300):
            _, writer = await asyncio.open_connection("127.0.0.1", number)
            stack.callback(writer.close)
            writer.write(said)
        await _answered(server)
    await _answered(server)


async def test_calls_that_are_reset_at_once(server: FakeServer, stubs: Stubs) -> None:
    """Two thousand calls that are cancelled as soon as they are sent leave nothing running (CVE-2023-44487's pattern)."""
    for _ in range(20):
        calls = [stubs.generation.GenerateStream(ask_stream(max_tokens=500)) for _ in range(100)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
    await _answered(server)
    load = server.app.admission
    await until(lambda: load.running == 0 and load.waiting == 0)


async def test_metadata_that_is_too_large(server: FakeServer, stubs: Stubs) -> None:
    """64 KiB of metadata are refused by gRPC's own limit, and the next call is served."""
    refusal = await refused(stubs.engine.GetEngine(engine_pb2.GetEngineRequest(), metadata=[("x-big", "a" * 65536)]))
    assert refusal.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    await _answered(server)

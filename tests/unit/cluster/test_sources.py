"""Where a router's replicas come from: a DNS name that has several addresses; and what is none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Set
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from grpc import aio

from engine.cluster.fleet import DnsSource, Fleet, StaticSource, sources
from engine.cluster.router.workers import source_of
from engine.config import RouterSettings
from engine.errors import BadConfiguration
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import until


async def test_a_name_stands_for_the_addresses_it_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of its records is told; a question that fails changes nothing; before the first answer there is nobody."""
    answers: list[Any] = [
        socket.gaierror("no such name"),
        ["10.0.0.2", "10.0.0.1"],
        ["10.0.0.1", "10.0.0.2"],  # the same in another order: nothing to tell
        socket.gaierror("temporary failure"),
        ["10.0.0.3", "fd00::3"],
    ]

    async def getaddrinfo(_: object, name: str, port: int, **__: Any) -> list[Any]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert name == "engines.default.svc"
        return [
            (socket.AF_INET6, 1, 6, "", (host, port, 0, 0)) if ":" in host else (socket.AF_INET, 1, 6, "", (host, port))
            for host in answer
        ]

    monkeypatch.setattr(sources, "_ASK_S", 0)
    monkeypatch.setattr("asyncio.BaseEventLoop.getaddrinfo", getaddrinfo)
    source = source_of(RouterSettings(replicas="dns:engines.default.svc:50051"))
    assert isinstance(source, DnsSource)
    told = []
    async with aclosing(source.watch()) as changes:  # type: ignore[type-var]
        async for addresses in changes:
            told.append(addresses)
            if not answers:
                break
    assert told == [
        set(),
        {"10.0.0.1:50051", "10.0.0.2:50051"},
        {"10.0.0.3:50051", "[fd00::3]:50051"},
    ]


def test_a_name_without_a_port_is_refused() -> None:
    """It is told at the start, not when the first request finds nobody."""
    with pytest.raises(BadConfiguration, match="not host:port"):
        source_of(RouterSettings(replicas="dns:engines"))


@pytest.mark.parametrize("name", ["a..b", "x" * 70])
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    """Asked for, it would raise what is no failure of the DNS."""
    with pytest.raises(BadConfiguration, match="cannot be a DNS name"):
        source_of(RouterSettings(replicas=f"dns:{name}:80"))


@pytest.mark.parametrize("replicas", ["127.0.0.1:99999", "127.0.0.1:1,127.0.0.1:0", "dns:engines:70000"])
def test_a_port_that_there_cannot_be_is_refused(replicas: str) -> None:
    """Its last 16 bits, which gRPC would take, are another one."""
    with pytest.raises(BadConfiguration, match="1 to 65535"):
        source_of(RouterSettings(replicas=replicas))


async def test_a_source_that_fails_ends_the_start() -> None:
    """Nobody waits for a list that will never come."""

    class Broken:
        async def watch(self) -> AsyncIterator[Set[str]]:
            raise ValueError("no list")
            yield set()

    fleet = Fleet(Broken())
    with pytest.raises(ValueError, match="no list"):
        await asyncio.wait_for(fleet.start(), 5)
    await fleet.stop()


async def test_an_address_where_something_else_answers(start: StartCluster) -> None:
    """It is left out, now and when it is looked at again; the others are served from."""
    stranger = aio.server()

    async def answer(_: bytes, context: object) -> bytes:
        return b"\xff\xff\xff"

    methods = {"GetEngine": grpc.unary_unary_rpc_method_handler(answer)}
    stranger.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("loraplex.v1.EngineService", methods)])
    address = f"127.0.0.1:{stranger.add_insecure_port('127.0.0.1:0')}"
    await stranger.start()
    async with start(1) as cluster:
        fleet = Fleet(StaticSource([*cluster.addresses, address]), poll_s=0.01)
        await asyncio.wait_for(fleet.start(), 10)
        assert [link.address for link in fleet.usable()] == cluster.addresses
        await until(lambda: fleet.links[address].silent > 2)
        await fleet.stop()
    await stranger.stop(None)

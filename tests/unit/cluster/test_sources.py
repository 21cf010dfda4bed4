"""Where a router's replicas come from: a DNS name that has several addresses."""

from __future__ import annotations

import socket
from contextlib import aclosing
from typing import Any

import pytest

from engine.cluster.fleet import DnsSource, sources
from engine.cluster.router.workers import source_of
from engine.config import RouterSettings
from engine.errors import BadConfiguration


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

"""Routers that take each other's place at one port, under load: no call is refused or lost."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from engine.client import AsyncClient, RequestError
from engine.client.testing import write_base
from engine.cluster.ray.children import RouterChild
from engine.cluster.router import ports
from engine.config import RouterSettings, load
from engine.errors import AddressInUse
from loadtest.ports import free_port
from tests.unit.cluster.load import Load
from tests.unit.cluster.process import Process


def router(folder: Path, **given: Any) -> RouterChild:
    """A router that is ready, at a port that it shares."""
    shared = {"share_port": True, "log_level": "error", "poll_s": 0.1, "drain_s": 20}
    folder.mkdir()
    child = RouterChild(load(RouterSettings, **shared, **given).model_dump(mode="json"), folder)
    child.wait_ready(30)
    return child


async def _connecting(target: str, counts: Counter[str], going: asyncio.Event) -> None:
    """Calls, each by a connection of its own that has no second try."""
    while not going.is_set():
        async with AsyncClient(target, timeout_s=20, retries=0) as client:
            try:
                await client.generate(prompt="hello", max_tokens=1)
                counts["connected"] += 1
            except RequestError as error:  # it crossed with the goodbye; with a second try it would not have noticed
                counts["crossed" if error.code is grpc.StatusCode.CANCELLED else repr(error)] += 1
            except Exception as error:  # noqa: BLE001 - every failure counts
                counts[repr(error)] += 1


async def _http(url: str, counts: Counter[str], going: asyncio.Event) -> None:
    """Completions over HTTP, whose connections are kept."""
    asked: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 1}
    async with aiohttp.ClientSession() as session:
        while not going.is_set():
            try:
                async with session.post(f"{url}/v1/completions", json=asked) as answer:
                    counts[f"http {answer.status}"] += 1
            except aiohttp.ClientError as error:
                counts[repr(error)] += 1
            await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_router_takes_anothers_place(tmp_path: Path) -> None:
    """Callers with lasting connections, callers who connect for each call, and HTTP: all are answered."""
    write_base(tmp_path / "base")
    server, port, http_port = free_port(), free_port(), free_port()
    settings = {
        "model": str(tmp_path / "base"), "registry": str(tmp_path / "registry"), "cache": str(tmp_path / "cache"),
        "port": server, "http_port": 0, "token_interval_s": 0.002,
    }  # fmt: skip
    given = {"replicas": f"127.0.0.1:{server}", "port": port, "http_port": http_port}
    target = f"127.0.0.1:{port}"
    counts: Counter[str] = Counter()
    done = asyncio.Event()
    process = Process("tests.unit.cluster.slow_server", json.dumps(settings))
    current = await asyncio.to_thread(router, tmp_path / "0", **given)
    try:
        async with AsyncClient(target, timeout_s=30) as client:
            await client.wait_ready(timeout_s=30)
            callers = Load(client)
            others = [asyncio.create_task(_connecting(target, counts, done)) for _ in range(2)]
            others.append(asyncio.create_task(_http(f"http://127.0.0.1:{http_port}", counts, done)))
            async with callers.running(4, names=("",)):
                for number in (1, 2, 3):
                    last, current = current, await asyncio.to_thread(router, tmp_path / str(number), **given)
                    await asyncio.to_thread(last.stop, 30)
                    assert last.process.returncode == 0
            done.set()
            await asyncio.gather(*others)
    finally:
        current.stop(0)
        process.kill()
    assert not callers.wrong
    assert set(counts) <= {"connected", "crossed", "http 200"}
    assert counts["crossed"] <= 2 * 3  # no more than were on their way at the three goodbyes
    assert callers.answered > 100
    assert counts["connected"] > 20


async def test_another_fleets_port_is_not_shared() -> None:
    """Routers of one fleet share a port; another fleet's router is told that it is in use."""
    port = free_port()
    with ports.claim(port, "one"), ports.claim(port, "one"), pytest.raises(AddressInUse):
        ports.claim(port, "two")
    ports.claim(port, "two").close()

"""Real processes, really killed, under load: nobody loses an answer."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.client import AsyncClient
from engine.client.testing import write_adapter, write_base
from loadtest.ports import free_port
from tests.unit.cluster.load import NAMES, Load
from tests.unit.cluster.process import Process


@contextmanager
def processes(folder: Path, count: int) -> Iterator[tuple[list[Process], list[str], str]]:
    """Servers and a router as processes; their addresses."""
    write_base(folder / "base")
    ports = [free_port() for _ in range(count + 1)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    started: list[Process] = []
    try:
        for number, port in enumerate(ports[:-1]):
            settings = {
                "model": str(folder / "base"), "registry": str(folder / "registry"), "cache": str(folder / f"{number}"),
                "port": port, "http_port": 0, "drain_s": 5, "token_interval_s": 0.01,
            }  # fmt: skip
            started.append(Process("tests.unit.cluster.slow_server", json.dumps(settings)))
        router = ["router", "--replicas", ",".join(addresses[:-1]), "--port", str(ports[-1]), "--http-port", "0"]
        started.append(Process("engine.cli", *router, "--log-level", "error", "--poll-s", "0.1"))
        yield started, addresses[:-1], addresses[-1]
    finally:
        for one in started:
            one.kill()


@pytest.mark.slow
@pytest.mark.timeout(60)
async def test_replicas_are_killed_under_load(tmp_path: Path) -> None:
    """Servers are killed, frozen and politely restarted, one after the other: every answer comes whole, once and right."""
    with processes(tmp_path, 3) as (started, addresses, router):
        async with AsyncClient(router, timeout_s=30, retries=0) as client:
            for address in addresses:
                async with AsyncClient(address) as direct:
                    await direct.wait_ready(timeout_s=30)
            await client.wait_ready(timeout_s=30)
            for seed, name in enumerate(filter(None, NAMES)):
                write_adapter(tmp_path / name, seed)
                await client.adapters.publish(tmp_path / name, name)
            load = Load(client)
            pick = random.Random(5)
            async with load.running(12):
                until = time.monotonic() + 2
                while time.monotonic() < until:
                    await asyncio.sleep(0.4)
                    victim = started[pick.randrange(3)]
                    await asyncio.to_thread(victim.kill, pick.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
                    victim.start()
                    await asyncio.sleep(1.0)
            assert not load.wrong
            assert load.answered > 15

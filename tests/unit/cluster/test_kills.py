"""Real processes, really killed, under load: nobody loses an answer."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from engine.client import AsyncClient, Unavailable
from engine.client.testing import write_adapter, write_base
from loadtest.ports import free_port
from tests.unit.cluster.load import NAMES, Load
from tests.unit.cluster.process import Process

_KILLS = 4


@contextmanager
def processes(folder: Path, count: int, routers: int = 1) -> Iterator[tuple[list[Process], list[str], list[str]]]:
    """So many servers, and routers beside each other, as processes; the addresses of both."""
    write_base(folder / "base")
    ports = [free_port() for _ in range(count + routers)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    started: list[Process] = []
    try:
        for number, port in enumerate(ports[:count]):
            settings = {
                "model": str(folder / "base"), "registry": str(folder / "registry"), "cache": str(folder / f"{number}"),
                "port": port, "http_port": 0, "drain_s": 5, "token_interval_s": 0.01,
            }  # fmt: skip
            started.append(Process("tests.unit.cluster.slow_server", json.dumps(settings)))
        for port in ports[count:]:
            router = ["router", "--replicas", ",".join(addresses[:count]), "--port", str(port), "--http-port", "0"]
            started.append(Process("engine.cli", *router, "--log-level", "error", "--poll-s", "0.1"))
        yield started, addresses[:count], addresses[count:]
    finally:
        for one in started:
            one.kill()


@pytest.mark.slow
@pytest.mark.timeout(60)
async def test_replicas_are_killed_under_load(tmp_path: Path) -> None:
    """Servers are killed, frozen and politely restarted, one after the other: every answer comes whole, once and right."""
    with processes(tmp_path, 3) as (started, addresses, routers):
        async with AsyncClient(routers[0], timeout_s=30, retries=0) as client:
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
                for _ in range(_KILLS):
                    await asyncio.sleep(0.4)
                    victim = started[pick.randrange(3)]
                    await asyncio.to_thread(victim.kill, pick.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
                    victim.start()
                    await asyncio.sleep(1.0)
            assert not load.wrong
            assert load.answered > 15


@pytest.mark.slow
@pytest.mark.timeout(60)
async def test_a_router_is_killed_under_load(tmp_path: Path) -> None:
    """Callers of the router beside it notice nothing, who knows both goes on there, and its own find it again."""
    with processes(tmp_path, 2, routers=2) as (started, addresses, routers):
        async with AsyncExitStack() as stack:
            targets = (*addresses, *routers, f"ipv4:{','.join(routers)}")
            clients = []
            for target in targets:
                client = AsyncClient(target, timeout_s=30, retries=0 if target == routers[1] else 4)
                clients.append(await stack.enter_async_context(client))
                await client.wait_ready(timeout_s=30)
            own, beside, both = Load(clients[2], pause_s=0.05), Load(clients[3]), Load(clients[4], streams=False)
            loads = (own, beside, both)
            async with AsyncExitStack() as running:
                for load in loads:
                    await running.enter_async_context(load.running(4, names=("",)))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(started[2].kill)
                before = [load.answered for load in loads]
                await asyncio.sleep(1.0)
                after = [load.answered for load in loads]
                started[2].start()
                await clients[2].wait_ready(timeout_s=30)
                await asyncio.sleep(0.5)
            assert after[1] > before[1]
            assert after[2] > before[2]
            assert own.answered > after[0]
            assert {type(wrong[-1]) for wrong in own.wrong} <= {Unavailable}
            assert beside.wrong == both.wrong == []

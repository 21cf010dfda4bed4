"""Where Prometheus finds the servers' metrics, through a router that knows the servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp

from engine.api.loraplex.v1 import engine_pb2
from engine.cluster.router.discovery import Discovery
from tests.unit.cluster.conftest import Cluster, StartCluster


async def discovered(cluster: Cluster) -> list[dict[str, Any]]:
    """What the router answers."""
    url = f"http://127.0.0.1:{cluster.router.http_port}/discovery"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        found: list[dict[str, Any]] = await answer.json()
        return found


async def test_prometheus_finds_every_server(start: StartCluster) -> None:
    """Each at its own HTTP port, whichever that is, by the name that it has in the router's own metrics."""
    async with start(2) as cluster:
        found = {one["labels"]["replica"]: one["targets"] for one in await discovered(cluster)}
        assert found == {f"127.0.0.1:{app.port}": [f"127.0.0.1:{app.http_port}"] for app in cluster.apps}
        async with aiohttp.ClientSession() as session:
            for (target,) in found.values():
                async with session.get(f"http://{target}/metrics") as page:
                    assert "loraplex_engine_ready 1.0" in await page.text()


async def test_a_server_that_does_not_answer_stays_a_target(start: StartCluster) -> None:
    """Prometheus then says that it is down; it is one no more when it has left the fleet."""
    async with start(2) as cluster:
        await cluster.apps[0].stop()
        await cluster.look(0)
        assert len(cluster.router.fleet.usable()) == 1
        assert len(await discovered(cluster)) == 2
        await cluster.router.fleet._adopt({cluster.addresses[1]})
        assert [one["labels"]["replica"] for one in await discovered(cluster)] == cluster.addresses[1:]


def test_targets_behind_tls() -> None:
    """Prometheus is told to use it; a server that tells no port is no target."""
    engines = {"[::1]:50051": engine_pb2.GetEngineResponse(http_port=9090), "old:1": engine_pb2.GetEngineResponse()}
    fleet: Any = SimpleNamespace(access=SimpleNamespace(tls=object()), engines=engines)
    (target,) = Discovery(fleet).targets()
    assert target["targets"] == ["[::1]:9090"]
    assert target["labels"]["__scheme__"] == "https"

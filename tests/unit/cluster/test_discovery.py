"""Where Prometheus finds the servers' metrics, through a router that knows the servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from engine.api.loraplex.v1 import engine_pb2
from engine.cluster.fleet import watcher
from engine.cluster.router.discovery import Discovery
from tests.unit.cluster.conftest import Cluster, StartCluster
from tests.unit.server.conftest import until


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


async def test_an_answer_after_a_server_was_taken_off_the_list(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It brings nothing back; nor is anything kept of connections that are closed."""
    async with start(2, router={"poll_s": 60}) as cluster:
        fleet = cluster.router.fleet
        link = fleet.links[cluster.addresses[0]]
        get_engine = link.unary(watcher.GET_ENGINE)

        async def answer(*args: Any, **options: Any) -> Any:
            found = await get_engine(*args, **options)
            await fleet._adopt({cluster.addresses[1]})
            return found

        monkeypatch.setattr(link, "unary", lambda _: answer)
        await fleet.look(link)
        assert list(fleet.engines) == cluster.addresses[1:]
        await until(lambda: not fleet._leaving)


def test_targets_behind_tls() -> None:
    """Prometheus is told to use it; a server that tells no port is no target."""
    engines = {"[::1]:50051": engine_pb2.GetEngineResponse(http_port=9090), "old:1": engine_pb2.GetEngineResponse()}
    fleet: Any = SimpleNamespace(access=SimpleNamespace(tls=object()), engines=engines)
    (target,) = Discovery(fleet).targets()
    assert target["targets"] == ["[::1]:9090"]
    assert target["labels"]["__scheme__"] == "https"

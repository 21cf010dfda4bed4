"""Where Prometheus finds the replicas' /metrics: on Ray each server's HTTP port is whichever was free."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from engine.cluster.fleet import Fleet


class Discovery:
    """`/discovery` in the form of Prometheus' HTTP service discovery: one target for each replica that has ever answered."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> list[web.RouteDef]:
        """Its path."""
        return [web.get("/discovery", self._answer)]

    def targets(self) -> list[dict[str, Any]]:
        """Hosts and ports, labelled with the replica's address as it is in this router's own metrics."""
        scheme = {"__scheme__": "https"} if self._fleet.access.tls else {}
        return [
            {
                "targets": [f"{address.rpartition(':')[0]}:{engine.http_port}"],
                "labels": {"replica": address, "base": engine.base.name} | scheme,
            }
            for address, engine in sorted(self._fleet.engines.items())
            if engine.http_port
        ]

    async def _answer(self, _: web.Request) -> web.Response:
        return web.json_response(self.targets())

"""The HTTP side port: /metrics for Prometheus, /healthz and /readyz for whoever restarts and routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from engine.errors import AddressInUse


class Page(Protocol):
    """Whatever has metrics."""

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        ...


class SidePort:
    """`alive` false means: restart me. `ready` false means: send me no requests."""

    def __init__(self, metrics: Page, *, alive: Callable[[], bool], ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._checks = {"/healthz": alive, "/readyz": ready}
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which matters when 0 was asked for. Raises AddressInUse."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics_page)
        for path in self._checks:
            app.router.add_get(path, self._check)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_port=False)
        try:
            await site.start()
        except OSError as error:
            raise AddressInUse(f"{host}:{port} (HTTP)") from error
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close the port."""
        if self._runner:
            await self._runner.cleanup()

    async def _metrics_page(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _check(self, request: web.Request) -> web.Response:
        good = self._checks[request.path]()
        return web.Response(text="ok\n" if good else "no\n", status=200 if good else 503)

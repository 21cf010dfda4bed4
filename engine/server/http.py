"""The HTTP side port: /metrics for Prometheus, /healthz and /readyz for whoever restarts and routes; and a site."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from engine.errors import AddressInUse, LoraplexError, Unauthenticated
from engine.server.identity import Identity
from engine.server.identity.tls import Tls

MAX_CONNECTIONS = 4096
FIRST_REQUEST_S = 20.0  # a connection that has sent no request by then is closed
_HANDSHAKE_S = 10.0  # less than that, so that it is over by then
_IDLE_S = 75.0  # between requests of a connection
_BACKLOG = 512
_CLOSE_S = (
    0.5  # for answers under way when the port closes; aiohttp takes it twice: it waits, then tells and waits again
)


class Page(Protocol):
    """Whatever has metrics."""

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        ...


class Site(Protocol):
    """Whatever else is to be found at this port."""

    @property
    def middlewares(self) -> Iterable[Any]:
        """What every request passes."""
        ...

    def routes(self) -> Iterable[web.AbstractRouteDef]:
        """Its paths."""
        ...


class SidePort:
    """`alive` false means: restart me. `ready` false means: send me no requests. `more` are paths for programs, as /metrics."""

    def __init__(
        self,
        metrics: Page,
        *,
        alive: Callable[[], bool],
        ready: Callable[[], bool],
        identity: Identity | None = None,
        tls: Tls | None = None,
        site: Site | None = None,
        more: Iterable[web.AbstractRouteDef] = (),
    ) -> None:
        self._metrics = metrics
        self._identity = identity
        self._site = site
        self._more = more
        self._tls = identity.tls if identity else tls
        self._silent: dict[Any, asyncio.TimerHandle] = {}  # connections by which no request has come yet
        self._checks = {"/healthz": alive, "/readyz": ready}
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._leaving = False
        self._under_way = 0  # requests
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self, host: str, port: int, *, share: bool = False) -> int:
        """Listen, with `share` beside others; returns the port, which matters when 0 was asked for. Raises AddressInUse."""
        app = web.Application(middlewares=(self._note, *(self._site.middlewares if self._site else ())))
        if self._site:
            app.add_routes(self._site.routes())
        app.add_routes(self._more)
        app.on_response_prepare.append(self._say_goodbye)
        app.router.add_get("/metrics", self._metrics_page)
        for path in self._checks:
            app.router.add_get(path, self._check)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_log(),
            handler_cancellation=True,  # who hangs up frees its place
            keepalive_timeout=_IDLE_S,
            shutdown_timeout=_CLOSE_S,
        )
        await self._runner.setup()
        context = self._tls.context if self._tls else None
        loop = asyncio.get_running_loop()
        try:
            self._listening = await loop.create_server(
                self._connection, host, port, ssl=context, reuse_port=share, backlog=_BACKLOG,
                ssl_handshake_timeout=_HANDSHAKE_S if context else None,
            )  # fmt: skip
        except OSError as error:
            raise AddressInUse(f"{host}:{port} (HTTP)") from error
        return int(self._listening.sockets[0].getsockname()[1])

    def _connection(self) -> asyncio.Protocol:
        """A new connection: closed at once if there are too many, and soon if no request comes (slow loris)."""
        server = self._runner.server if self._runner else None
        if server is None or len(server.connections) >= MAX_CONNECTIONS:
            return _Closed()
        protocol: Any = server()
        timer = asyncio.get_running_loop().call_later(FIRST_REQUEST_S, self._drop_silent, protocol)
        self._silent[protocol] = timer
        return protocol  # type: ignore[no-any-return]

    def _drop_silent(self, protocol: Any) -> None:
        self._silent.pop(protocol, None)
        if protocol.transport is not None:
            protocol.transport.abort()

    def leave(self) -> None:
        """Take no new connections, and let those that are there end with their next answer."""
        self._leaving = True
        if self._listening:
            self._listening.close()

    async def until_idle(self) -> None:
        """Return when no request is under way."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Close the port; what is under way then is cut within a second."""
        self.leave()
        for timer in self._silent.values():
            timer.cancel()
        self._silent.clear()
        if self._runner:
            await self._runner.cleanup()

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """A request has come by this connection."""
        if timer := self._silent.pop(request.protocol, None):
            timer.cancel()
        self._under_way += 1
        self._idle.clear()
        try:
            answer: web.StreamResponse = await handler(request)
            return answer
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _say_goodbye(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._leaving:
            response.headers["Connection"] = "close"
            response.force_close()

    async def _metrics_page(self, request: web.Request) -> web.Response:
        try:
            if self._identity:
                await self._identity.check_metrics(request)
        except LoraplexError as error:
            return refusal(error)
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _check(self, request: web.Request) -> web.Response:
        good = self._checks[request.path]()
        return web.Response(text="ok\n" if good else "no\n", status=200 if good else 503)


def _log() -> logging.Logger:
    log = logging.getLogger("loraplex.http.server")
    log.addFilter(_well_formed)
    return log


def _well_formed(record: logging.LogRecord) -> bool:
    """Whether a line is not about a malformed request: it would quote that, credentials and all."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


class _Closed(asyncio.Protocol):
    """A connection that is not wanted."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()


def refusal(error: LoraplexError) -> web.Response:
    """A refusal by identity, for people and programs that read no JSON."""
    unknown = isinstance(error, Unauthenticated)
    headers = {"WWW-Authenticate": "Bearer"} if unknown else {}
    return web.Response(text=f"{error.message}\n{error.fix}\n", status=401 if unknown else 403, headers=headers)

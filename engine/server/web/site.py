"""All that the HTTP port has for people and clients: the OpenAI-compatible API and the console."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from grpc import aio

from engine.config import is_loopback
from engine.server.identity import Identity
from engine.server.web.console.routes import Console
from engine.server.web.guard import guard
from engine.server.web.inprocess import InProcess
from engine.server.web.openai.routes import OpenAI


class Site:
    """The site of one server. `calls` takes its services once they exist; without `identity`, others ask who calls."""

    def __init__(
        self,
        interceptors: Sequence[aio.ServerInterceptor],
        host: str,
        max_body: int,
        reports: Path | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.calls = InProcess(interceptors)
        self.middlewares: list[Any] = [guard(loopback=is_loopback(host))]
        self._openai = OpenAI(self.calls, max_body)
        self._console = Console(self.calls, identity, reports, max_body)

    def routes(self) -> list[web.RouteDef]:
        """Its paths."""
        return [*self._openai.routes(), *self._console.routes()]

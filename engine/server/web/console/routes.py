"""The console's page, the calls that it may make, and the reports that it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from engine.api.loraplex.v1 import adapters_pb2, engine_pb2
from engine.server.identity import ANYBODY, Identity, Principal, Role
from engine.server.web import body
from engine.server.web.console.reports import Reports
from engine.server.web.inprocess import InProcess
from engine.server.web.openai.routes import error_of
from engine.server.web.refusal import Refusal, Refused, wrong

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_METHODS = {
    method.full_name.removeprefix("loraplex.v1."): method
    for service in (
        adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"],
        engine_pb2.DESCRIPTOR.services_by_name["EngineService"],
    )
    for method in service.methods
    if not method.client_streaming and method.name != "WatchAdapters"
}
# Nothing but this server's own files, no script in a page, no markup from text (trusted types), no frame around it.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; frame-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
_OWN = "x-loraplex-console"  # a header that no page of another site can send without being asked first


class Console:
    """The console over `calls`; whatever it shows or does is a call that gRPC has, too."""

    def __init__(self, calls: InProcess, identity: Identity | None, reports: Path | None, max_body: int) -> None:
        self._calls = calls
        self._identity = identity
        self._reports = Reports(reports)
        self._max_body = max_body
        self._files = {path.name: path.read_bytes() for path in _static() if Path(path.name).suffix in _TYPES}

    def routes(self) -> list[web.RouteDef]:
        """What to add to the HTTP port."""
        return [
            web.get("/", self.page),
            web.get("/console/me", self.me),
            web.get("/console/reports", self.reports),
            web.post("/console/reports/open", self.open_report),
            web.post("/console/call/{method}", self.call),
            web.get("/console/{file}", self.file),
            web.get("/reports/{ticket}/{path:.+}", self.report),
        ]

    async def page(self, request: web.Request) -> web.Response:
        """The one page."""
        return self._file("index.html")

    async def file(self, request: web.Request) -> web.Response:
        """A file that it loads."""
        return self._file(request.match_info["file"])

    def _file(self, name: str) -> web.Response:
        if name not in self._files:
            raise web.HTTPNotFound
        headers = _HEADERS | {"Content-Type": f"{_TYPES[Path(name).suffix]}; charset=utf-8"}
        response = web.Response(body=self._files[name], headers=headers)
        response.enable_compression()
        return response

    async def me(self, request: web.Request) -> web.Response:
        """Who the caller is, and what they may do: for buttons; the calls check it themselves."""
        method = _METHODS["EngineService.GetCaller"]
        return web.json_response(_json(await self._calls.unary(request, method, engine_pb2.GetCallerRequest())))

    async def call(self, request: web.Request) -> web.StreamResponse:
        """Make a call of the gRPC API: JSON in, JSON out, a line for each message of a stream.

        The JSON is https://protobuf.dev/programming-guides/json. A refusal after the first line is a last line with an `error`.
        """
        _check_own(request)
        method = _METHODS.get(request.match_info["method"])
        if method is None:
            raise web.HTTPNotFound
        await self._who(request)  # nothing that somebody unknown sends is read
        message = _parse(method, await body.read(request, self._max_body))
        if not method.server_streaming:
            return web.json_response(_json(await self._calls.unary(request, method, message)))
        return await self._lines(request, method, message)

    async def _lines(self, request: web.Request, method: Any, message: Message) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        response.enable_chunked_encoding()
        try:
            async for answer in self._calls.stream(request, method, message):
                if not response.prepared:
                    await response.prepare(request)
                await response.write(_line(_json(answer)))
        except Refused as refused:
            if not response.prepared:
                raise
            await response.write(_line({"error": error_of(refused.refusal)}))
        return response

    async def reports(self, request: web.Request) -> web.Response:
        """The load-test reports that there are."""
        await self._observer(request)
        return web.json_response({"configured": self._reports.configured, "reports": await self._reports.found()})

    async def open_report(self, request: web.Request) -> web.Response:
        """An address under which a browser can open one of them for a while, which needs no header."""
        _check_own(request)
        await self._observer(request)
        data = await body.read(request, 4096)
        try:
            wanted = json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise wrong("", "the body is not JSON") from error
        name = wanted.get("name") if isinstance(wanted, dict) else None
        return web.json_response({"url": self._reports.open(str(name))})

    async def report(self, request: web.Request) -> web.Response:
        """A file of a report that was opened."""
        return await self._reports.file(request.match_info["ticket"], request.match_info["path"])

    async def _observer(self, request: web.Request) -> None:
        (await self._who(request)).require(Role.OBSERVE)

    async def _who(self, request: web.Request) -> Principal:
        return await self._identity.of_http(request) if self._identity else ANYBODY


def _static() -> list[Any]:
    return list((resources.files("engine") / "server" / "web" / "console" / "static").iterdir())


def _check_own(request: web.Request) -> None:
    if request.headers.get(_OWN) != "1":
        raise Refused(Refusal("PERMISSION_DENIED", f"the header {_OWN} is missing", "OTHER_SITE"))


def _parse(method: Any, data: bytes) -> Message:
    try:
        content = json.loads(data)
        found: Message = ParseDict(content, GetMessageClass(method.input_type)(), max_recursion_depth=20)
    except (ValueError, RecursionError, ParseError, TypeError, AttributeError) as error:
        problem = (
            str(error).splitlines()[0][:200] if isinstance(error, ParseError) else "the body is not such a message"
        )
        raise wrong("", problem) from error
    return found


def _json(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"

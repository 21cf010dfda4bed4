"""Load-test reports: which there are below a folder, and their files, to whom they were opened for."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from aiohttp import web

from engine.server.web.refusal import Refusal, Refused

_PAGE = "report.html"
_DATA = "run.json"
_MOST = 200  # reports listed, newest first
_DEPTH = 3  # folders below the one that is configured
_LARGEST = 16 * 1024 * 1024  # bytes of run.json that are read for its verdict
_TICKET_S = 600.0
_TICKETS = 256
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".xml": "application/xml",
    ".csv": "text/csv; charset=utf-8",
}
# A report is somebody's file: it gets no script, no way to this server, and only the console may frame it.
_HEADERS = {
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Reports:
    """The reports below `folder`; None if none is configured."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder.resolve() if folder else None
        self._tickets: OrderedDict[str, tuple[float, Path]] = OrderedDict()

    @property
    def configured(self) -> bool:
        """Whether there is a folder to look into."""
        return self._folder is not None

    async def found(self) -> list[dict[str, Any]]:
        """Name, time and verdict of each, newest first."""
        return await asyncio.to_thread(self._list)

    def _list(self) -> list[dict[str, Any]]:
        pages = [page for page in self._pages() if page.is_file() and not page.is_symlink()]
        pages.sort(key=lambda page: page.stat().st_mtime, reverse=True)
        return [self._about(page) for page in pages[:_MOST]]

    def _pages(self) -> list[Path]:
        if self._folder is None or not self._folder.is_dir():
            return []
        return [page for depth in range(_DEPTH + 1) for page in self._folder.glob("*/" * depth + _PAGE)]

    def _about(self, page: Path) -> dict[str, Any]:
        folder = page.parent
        name = "." if folder == self._folder else folder.relative_to(self._folder or folder).as_posix()
        return {"name": name, "at": page.stat().st_mtime, **_told(folder / _DATA)}

    def open(self, name: str) -> str:
        """A path to a report's page, good for ten minutes. Raises Refused when there is no such report."""
        folder = self._within(self._folder, name)
        if folder is None or not (folder / _PAGE).is_file():
            raise Refused(Refusal("NOT_FOUND", "there is no such report", "PAGE_NOT_FOUND"))
        ticket = secrets.token_urlsafe(18)
        self._tickets[ticket] = (time.monotonic() + _TICKET_S, folder)
        if len(self._tickets) > _TICKETS:
            self._tickets.popitem(last=False)
        return f"/reports/{ticket}/{_PAGE}"

    async def file(self, ticket: str, path: str) -> web.Response:
        """One of its files."""
        until, folder = self._tickets.get(ticket, (0.0, None))
        found = self._within(folder, path) if time.monotonic() < until else None
        kind = _TYPES.get(found.suffix) if found else None
        if found is None or kind is None or not found.is_file():
            raise web.HTTPNotFound
        return web.Response(body=await asyncio.to_thread(found.read_bytes), headers=_HEADERS | {"Content-Type": kind})

    def _within(self, folder: Path | None, name: str) -> Path | None:
        """The file or folder of this name if it lies within `folder`, links and all."""
        if folder is None or "\0" in name:
            return None
        try:
            found = (folder / name).resolve()
            return found if found.is_relative_to(folder) and found.exists() else None
        except (OSError, ValueError):  # such as a name that no file system takes, or half of a character
            return None


def _told(data: Path) -> dict[str, Any]:
    """What a run says of itself; nothing if it cannot be read."""
    try:
        if data.is_symlink() or data.stat().st_size > _LARGEST:
            return {}
        content = json.loads(data.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: content[key] for key in ("kind", "verdict") if isinstance(content.get(key), str)}

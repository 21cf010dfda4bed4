"""The HTTP port asks the same of its callers as gRPC does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.client.testing import FakeServer
from tests.unit.identity.conftest import Keys, token

Reply = tuple[int, Any]


class Http:
    """Requests to the server's HTTP port."""

    def __init__(self, session: aiohttp.ClientSession, url: str, keys: Keys) -> None:
        self._session, self._url, self._keys = session, url, keys

    async def __call__(self, tenant: str, path: str, content: Any = None, headers: Any = ()) -> Reply:
        """The status and what came with it; `tenant` "" shows no key."""
        shown = [*headers, ("x-loraplex-console", "1")]
        if tenant:
            shown.append(("Authorization", f"Bearer {self._keys.of[tenant]}"))
        method = "GET" if content is None else "POST"
        async with self._session.request(method, self._url + path, json=content, headers=shown) as response:
            return response.status, await response.json()


@pytest.fixture
async def http(server: FakeServer, keys: Keys) -> AsyncIterator[Http]:
    """Requests to the shared server."""
    async with aiohttp.ClientSession() as session:
        yield Http(session, f"http://127.0.0.1:{server.app.http_port}", keys)


def chat(model: str) -> dict[str, Any]:
    """A question."""
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


async def test_models(http: Http) -> None:
    """The list of models is the tenant's own; without a key there is none."""
    assert (await http("", "/v1/models"))[0] == 401
    status, found = await http("acme", "/v1/models")
    names = {one["id"].partition("@")[0] for one in found["data"]}
    assert status == 200
    assert "acme-bot" in names
    assert not [name for name in names if name.startswith("rival")]


async def test_chat(http: Http) -> None:
    """A model that is not on the list is refused in one way, whether or not it exists."""
    status, found = await http("acme", "/v1/chat/completions", chat("acme-bot"))
    assert (status, found["choices"][0]["finish_reason"]) == (200, "stop")
    there, gone = [await http("acme", "/v1/chat/completions", chat(name)) for name in ("rival-bot", "rival-xxx")]
    assert there[0] == gone[0] == 403
    assert str(there[1]).replace("rival-bot", "rival-xxx") == str(gone[1])
    assert (await http("watcher", "/v1/chat/completions", chat("acme-bot")))[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("x-loraplex-tenant", "ops")],
        [("Authorization", f"Bearer {token(exp=1)}")],
        [("Authorization", f"Bearer {token()}"), ("Authorization", f"Bearer {token()}")],
        [("Authorization", "Basic b3BzOm9wcw==")],
    ],
)
async def test_unknown(http: Http, headers: Any) -> None:
    """Who is not known gets a 401 at every door, whatever else they say."""
    for path, content in (
        ("/v1/models", None),
        ("/v1/chat/completions", chat("acme-bot")),
        ("/console/me", None),
        ("/console/reports", None),
        ("/console/call/AdapterService.ListAdapters", {}),
    ):
        assert (await http("", path, content, headers))[0] == 401, path


async def test_nothing_of_the_unknown_is_read(http: Http) -> None:
    """A body is looked at only once its sender is known, also just after somebody else was answered."""
    for path in ("/v1/chat/completions", "/v1/completions", "/console/call/AdapterService.ListAdapters"):
        wrong = {"model": "acme-bot", "messages": 1, "prompt": 1}
        assert (await http("acme", path, wrong))[0] == 400
        assert (await http("", path, wrong))[0] == 401
        assert (await http("", path, wrong, [("Authorization", "Bearer lpx_wrong")]))[0] == 401


async def test_bytes_that_are_no_text(http: Http, server: FakeServer) -> None:
    """Bytes in a header that stand for no letter make a wrong credential, and no bug of ours."""
    for shown in (b"\xff", b"lpx_\xff", b"\xff.\xff.\xff"):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.app.http_port)
        writer.write(b"GET /console/me HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + shown + b"\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()


async def test_console(http: Http, server: FakeServer, folder: Path) -> None:
    """The console tells a tenant its roles, and refuses what gRPC would, with a line in the audit log."""
    assert await http("watcher", "/console/me") == (
        200,
        {"identified": True, "tenant": "watcher", "roles": ["observe"]},
    )
    path, removed = "/console/call/AdapterService.RemoveAlias", {"name": "acme-bot", "alias": "canary"}
    status, found = await http("rival", path, removed)
    assert status == 403
    assert "may not use the adapter 'acme-bot'" in found["error"]["message"]
    assert (await http("acme", path, removed))[0] == 403
    assert '"adapter": "acme-bot"' in (folder / "audit.jsonl").read_text()

"""Who may do what over HTTP: the OpenAI API and the console ask as gRPC does, and tell as little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from engine.client.testing import FakeServer, fake_server
from tests.unit.identity.conftest import Keys, make_keys
from tests.unit.server.browser import CHROMIUM, browser

CHAT = [{"role": "user", "content": "hi"}]
JSON = {"x-loraplex-console": "1", "Content-Type": "application/json"}
TENANTS: dict[str, dict[str, Any]] = {
    "ops": {"roles": ["admin"], "adapters": ["*"], "base": True},
    "acme": {"roles": ["invoke"], "adapters": ["acme-*"], "base": False},
    "small": {"roles": ["invoke"], "adapters": ["acme-*"], "limits": {"max_tokens": 8}},
    "single": {
        "roles": ["invoke"],
        "adapters": ["acme-*"],
        "limits": {"max_tokens": 8, "requests_per_s": 0.01, "burst": 1},
    },
    "quick": {"roles": ["invoke"], "adapters": ["acme-*"], "limits": {"requests_per_s": 0.01}},
}


@pytest.fixture(scope="module")
def known() -> Keys:
    """The tenants, with a key each."""
    return make_keys(TENANTS)


@pytest.fixture(scope="module")
def site(known: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """A server that asks who calls, with two tenants' adapters."""
    folder = tmp_path_factory.mktemp("site")
    settings = {"policy": known.write(folder / "policy.yaml"), "audit_log": folder / "audit.jsonl", "reports": folder}
    with fake_server(refresh_s=60, **settings) as fake:
        fake.api_key = known.of["ops"]
        for name in ("acme-bot", "acme-bot", "rival-bot"):
            fake.publish(name)
        yield fake


def connect(site: FakeServer, key: str) -> openai.OpenAI:
    """The official client with a key."""
    return openai.OpenAI(base_url=f"{site.http_url}/v1", api_key=key, max_retries=0)


async def ask(site: FakeServer, key: str, path: str, body: Any = None) -> tuple[int, Any]:
    """POST a body, or GET without one; status and JSON of the last line."""
    headers = JSON | ({"Authorization": f"Bearer {key}"} if key else {})
    async with aiohttp.ClientSession() as session:
        data = None if body is None else json.dumps(body)
        async with session.request("POST" if data else "GET", site.http_url + path, data=data, headers=headers) as got:
            return got.status, json.loads((await got.text()).splitlines()[-1])


@pytest.mark.parametrize("key", ["nonsense", "lpx_" + "a" * 40, "a.b.c", "x" * 8000])
def test_wrong_keys(site: FakeServer, key: str) -> None:
    """A key that nobody has is the client's AuthenticationError, whatever is asked for."""
    with connect(site, key) as client:
        for call in (client.models.list, lambda: client.chat.completions.create(model="acme-bot", messages=CHAT)):
            with pytest.raises(openai.AuthenticationError) as refused:
                call()
            assert refused.value.response.headers["www-authenticate"] == "Bearer"
            assert key not in refused.value.response.text


async def test_oversized_key_is_not_logged(site: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """A header that is too long is refused, and nothing of it reaches the log."""
    async with aiohttp.ClientSession() as session:
        async with session.get(
            site.http_url + "/v1/models", headers={"Authorization": "Bearer " + "s3cret" * 2000}
        ) as got:
            assert got.status == 400
    assert "s3cret" not in caplog.text


def test_own_adapters_only(site: FakeServer, known: Keys) -> None:
    """A tenant is shown and answered by what is on its list; anything else is refused alike, whether it exists or not."""
    with connect(site, known.of["acme"]) as client:
        assert {model.id.partition("@")[0] for model in client.models.list()} == {"acme-bot"}
        answer = client.chat.completions.create(model="acme-bot", messages=CHAT, temperature=0)
        assert answer.model == "acme-bot@v1"
        told = []
        for name in ("rival-bot", "other-bot", site.app.settings.model.name):
            with pytest.raises(openai.PermissionDeniedError) as refused:
                client.completions.create(model=name, prompt="hi")
            told.append(refused.value.response.json()["error"]["message"].replace(name, "NAME"))
        assert told[0] == told[1]


def test_limits(site: FakeServer, known: Keys) -> None:
    """A chat without a number of tokens gets what its tenant may have; asking for more, and haste, are refused."""
    with connect(site, known.of["small"]) as client:
        short = client.chat.completions.create(model="acme-bot", messages=CHAT, temperature=0)
        assert short.choices[0].message.content == "acme-bot"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="acme-bot", messages=CHAT, max_tokens=9)
        assert refused.value.param == "max_tokens"
    with connect(site, known.of["quick"]) as client:
        client.completions.create(model="acme-bot", prompt="hi")
        with pytest.raises(openai.RateLimitError) as hasty:
            client.completions.create(model="acme-bot", prompt="hi")
        assert int(hasty.value.response.headers["retry-after"]) >= 1


def test_one_chat_counts_once(site: FakeServer, known: Keys) -> None:
    """A chat without a number of tokens is one request of its tenant's, and one that asks for too many tokens is none."""
    with connect(site, known.of["single"]) as client:
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="acme-bot", messages=CHAT, max_tokens=9)
        short = client.chat.completions.create(model="acme-bot", messages=CHAT, temperature=0)
        assert short.choices[0].message.content == "acme-bot"
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="acme-bot", messages=CHAT)


async def test_console_asks_who(site: FakeServer, known: Keys) -> None:
    """The console says who one is, and refuses reports and changes to those without the role."""
    assert (await ask(site, "", "/console/me"))[0] == 401
    status, me = await ask(site, known.of["acme"], "/console/me")
    assert (status, me) == (200, {"identified": True, "tenant": "acme", "roles": ["invoke"]})
    change = {"name": "acme-bot", "alias": "stable", "version": "v1", "actor": "console"}
    for path, body in (("/console/reports", None), ("/console/call/AdapterService.SetAlias", change)):
        assert (await ask(site, known.of["acme"], path, body))[0] == 403
        assert (await ask(site, "", path, body))[0] == 401
        assert (await ask(site, known.of["ops"], path, body))[0] == 200


async def test_console_signs_and_is_audited(site: FakeServer, known: Keys) -> None:
    """A change by the console has its tenant in the alias log and in the audit log, whatever the page says."""
    change = {"name": "rival-bot", "alias": "stable", "version": "v1", "actor": "console", "reason": "why not"}
    status, last = await ask(site, known.of["ops"], "/console/call/AdapterService.SetAlias", change)
    assert status == 200
    assert last["change"]["actor"].startswith("ops (key:")
    path = site.app.settings.audit_log
    assert path
    lines = [json.loads(line) for line in (await asyncio.to_thread(path.read_text)).splitlines()]
    (line,) = [one for one in lines if one["method"].endswith("SetAlias") and one.get("adapter") == "rival-bot"]
    assert (line["tenant"], line["result"]) == ("ops", "OK")
    assert line["peer"].startswith("ipv4:127.0.0.1:")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
async def test_sign_in(site: FakeServer, known: Keys, tmp_path: Path) -> None:
    """The page asks for a key, says when it is wrong, offers what the tenant may do, and forgets it on leaving."""
    async with browser(tmp_path / "profile") as page:
        await page.open(f"{site.http_url}/#/adapters/acme-bot")
        for key in ("wrong", known.of["acme"]):
            await page.until("document.querySelector('#key')")
            send = f"document.querySelector('#key').value = '{key}'; document.querySelector('form').requestSubmit()"
            await page.see(send)
            if key == "wrong":
                await page.until("document.querySelector('[role=alert]:not([hidden])')")
        await page.until("document.querySelector('h1')?.textContent === 'acme-bot'")
        assert not await page.see("document.querySelectorAll('[aria-label^=Promote]').length")
        assert await page.see("document.querySelector('#whoami').textContent") == "acmeSign out"
        await page.see("setTimeout(() => document.querySelector('#whoami button').click())")
        await page.until("document.querySelector('#key')")
        assert await page.see("sessionStorage.length + localStorage.length + document.cookie.length") == 0

"""The console: its calls and reports by hand, and its pages in a real browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.client.testing import FakeServer, fake_server
from tests.unit.server.browser import CHROMIUM, Page, browser
from tests.unit.server.conftest import engine_of

OWN = {"x-loraplex-console": "1", "Content-Type": "application/json"}
NOTES = "<img src=x onerror=document.title='hacked'> & <b>bold</b>"
PAGES = ("", "adapters", "adapters/support", "playground", "reports")
# Wider than the screen, apart from what may be scrolled by itself; controls without a name; text too faint to read is left out.
MEASURE = """JSON.stringify({
  wide: [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, dialog, .sr, .skip, svg')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90)),
  nameless: [...document.querySelectorAll('button, a, input, select, textarea, iframe')].filter(e =>
    !(e.textContent.trim() || e.ariaLabel || e.title || e.labels?.length)).map(e => e.outerHTML.slice(0, 90)),
  headings: document.querySelectorAll('h1').length, landmarks: document.querySelectorAll('main, nav, header').length,
  current: document.querySelectorAll('#nav [aria-current=page]').length})"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one report, a secret beside it, and a link that leads to the secret."""
    folder = tmp_path_factory.mktemp("site")
    run = folder / "reports" / "smoke"
    run.mkdir(parents=True)
    (run / "report.html").write_text("<h1>MEETS</h1><script>document.title='hacked'</script>")
    (run / "run.json").write_text(json.dumps({"kind": "run", "verdict": "MEETS"}))
    (folder / "secret.json").write_text("{}")
    (run / "link.json").symlink_to(folder / "secret.json")
    return folder / "reports"


@pytest.fixture(scope="module")
def fake(reports: Path) -> Iterator[FakeServer]:
    """A server with adapters, of which one has hostile notes."""
    with fake_server(refresh_s=60, reports=reports) as server:
        server.publish("legal")
        server.publish("support", notes=NOTES, evaluation={"metric": "exact match", "adapter": 0.9, "base": 0.1})
        server.publish("support", notes=NOTES)
        yield server


async def ask(fake: FakeServer, path: str, body: Any = None, headers: dict[str, str] = OWN) -> tuple[int, str]:
    """POST a body, or GET without one."""
    async with aiohttp.ClientSession() as session:
        data = None if body is None else body if isinstance(body, str) else json.dumps(body)
        async with session.request(
            "GET" if body is None else "POST", fake.http_url + path, data=data, headers=headers
        ) as got:
            return got.status, await got.text()


async def test_page_is_small_and_closed(fake: FakeServer) -> None:
    """The page allows no script but its own files, no frame and no other origin; all files together are below 300 kB."""
    async with aiohttp.ClientSession() as session:
        async with session.get(fake.http_url + "/") as got:
            policy = got.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert got.headers["X-Frame-Options"] == "DENY"
            assert "<script>" not in await got.text()
    folder = Path(__file__).parents[3] / "engine/server/web/console/static"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    assert not [path for path in folder.glob("*.js") if "innerHTML" in path.read_text()]


async def test_calls_are_those_of_grpc(fake: FakeServer) -> None:
    """Answers, progress and refusals are the gRPC API's, as JSON."""
    status, text = await ask(fake, "/console/call/AdapterService.GetAdapter", {"name": "support"})
    assert status == 200
    assert json.loads(text)["versions"][0]["notes"] == NOTES
    change = {"name": "legal", "alias": "stable", "version": "v1", "actor": "me", "reason": "good"}
    status, text = await ask(fake, "/console/call/AdapterService.SetAlias", change)
    *steps, last = map(json.loads, text.splitlines())
    assert status == 200
    assert {"switching"} <= {step["progress"]["stage"] for step in steps}
    assert (last["change"]["version"], last["change"]["actor"]) == ("v1", "me")
    status, text = await ask(fake, "/console/call/AdapterService.SetAlias", change | {"expected_version": "v9"})
    assert "alias_moved" in text
    status, text = await ask(fake, "/console/call/AdapterService.GetAdapter", {"name": "nobody"})
    assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "body", "status"),
    [
        ("AdapterService.GetAdapter", {"name": "../x"}, 400),
        ("AdapterService.GetAdapter", {"nonsense": 1}, 400),
        ("AdapterService.GetAdapter", "[]", 400),
        ("AdapterService.GetAdapter", "{", 400),
        ("AdapterService.GetAdapter", "[" * 50_000, 400),
        ("AdapterService.GetAdapter", {"name": ["x"]}, 400),
        ("AdapterService.PublishAdapter", {}, 404),
        ("AdapterService.__init__", {}, 404),
        ("GenerationService.Generate", {}, 404),
    ],
)
async def test_bad_calls(fake: FakeServer, method: str, body: Any, status: int) -> None:
    """What is no such message, or no method of the console's, is refused."""
    assert (await ask(fake, f"/console/call/{method}", body))[0] == status


async def test_no_other_page_can_call(fake: FakeServer) -> None:
    """Without the console's own header, or from another site, nothing is done."""
    path, body = "/console/call/AdapterService.UnloadAdapter", {"adapter": "support"}
    without = {"Content-Type": "application/json"}
    for headers in (without, OWN | {"Origin": "https://evil.example"}, OWN | {"Host": "evil.example"}):
        status, text = await ask(fake, path, body, headers)
        assert (status, json.loads(text)["error"]["type"]) == (403, "permission_error")
    assert (await ask(fake, path, body, OWN | {"Content-Type": "text/plain"}))[0] == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [("{", 400), ("[" * 4000, 400), ("[]", 404), ('{"name": "\\ud800"}', 404), ('{"name": "nobody"}', 404)],
)
async def test_bad_reports(fake: FakeServer, body: str, status: int) -> None:
    """A body that is not JSON is refused as such, and a name of no report as a name."""
    assert (await ask(fake, "/console/reports/open", body))[0] == status


async def test_reports(fake: FakeServer) -> None:
    """A report is listed with its verdict and served for a while, harmless; nothing else of the disk is."""
    status, text = await ask(fake, "/console/reports")
    (found,) = json.loads(text)["reports"]
    assert (status, found["name"], found["verdict"]) == (200, "smoke", "MEETS")
    url = json.loads((await ask(fake, "/console/reports/open", {"name": "smoke"}))[1])["url"]
    async with aiohttp.ClientSession() as session:
        async with session.get(fake.http_url + url) as got:
            assert got.status == 200
            assert got.headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'")
    ticket = url.split("/")[2]
    tricks = (
        "..%2f..%2fsecret.json",
        "%2e%2e/%2e%2e/secret.json",
        "link.json",
        "%2fetc%2fpasswd",
        "x%00.html",
        "a" * 5000,
    )
    for trick in tricks:
        assert (await ask(fake, f"/reports/{ticket}/{trick}"))[0] == 404
    for name in ("..", "/", "/etc", "nowhere", "smoke/../..", "x\0", "a" * 3000):
        assert (await ask(fake, "/console/reports/open", {"name": name}))[0] == 404
    assert (await ask(fake, "/reports/guessed/report.html"))[0] == 404
    assert (await ask(fake, "/console/..%2froutes.py"))[0] == 404


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
async def test_in_a_browser(fake: FakeServer, tmp_path: Path) -> None:
    """Every page fits wide and narrow screens, and people can compare, promote, roll back and read a report."""
    async with browser(tmp_path / "profile") as page:
        await _load(page, fake)
        await _look(page, fake)
        await _compare(page, fake)
        await _promote(page, fake)
        await _read_report(page, fake)
        assert page.complaints == []
        assert not await page.see("document.title.includes('hacked')")


async def _load(page: Page, fake: FakeServer) -> None:
    await page.show(1280)
    await page.open(fake.http_url + "/")
    assert page.received < 300_000
    await page.until("document.querySelector('h1').textContent === 'fake-base'")


async def _look(page: Page, fake: FakeServer) -> None:
    for width, dark in ((1280, False), (360, True)):
        await page.show(width, dark=dark)
        for name in PAGES:
            await page.open(f"{fake.http_url}/#/{name}")
            found = json.loads(await page.see(MEASURE))
            assert (found["wide"], found["nameless"]) == ([], []), (name, width)
            assert (found["headings"], found["landmarks"], found["current"]) == (1, 3, 1)


async def _compare(page: Page, fake: FakeServer) -> None:
    await page.show(1280)
    await page.open(f"{fake.http_url}/#/playground?with=support@v1,support@v2")
    engine_of(fake).token_interval_s = 0.002
    await page.see(
        "document.querySelector('#prompt').value = '<b>hi</b>'; document.querySelector('form').requestSubmit()"
    )
    await page.until("document.querySelectorAll('.answer.going pre').length === 2")
    await page.until("document.querySelectorAll('.answer footer span').length >= 4")
    engine_of(fake).token_interval_s = 0.0
    said = await page.see("[...document.querySelectorAll('.answer pre')].map(e => e.textContent)")
    assert said == [f"support@v{n} heard: user: <b>hi</b>\nassistant:" for n in (1, 2)]


async def _promote(page: Page, fake: FakeServer) -> None:
    await page.open(f"{fake.http_url}/#/adapters/support")
    assert await page.see("document.querySelector('main').textContent.includes('<b>bold</b>')")
    await page.see("document.querySelector('[aria-label=\"Promote support@v2\"]').click()")
    await page.until("document.querySelector('dialog[open]')")
    assert fake.run(_current(fake)) == "v1"  # nothing has happened yet
    await page.see(
        "document.querySelector('#reason').value = 'better'; document.querySelector('dialog form').requestSubmit()"
    )
    await page.until("document.querySelector('#main').textContent.includes('current is v2')")
    assert fake.run(_current(fake)) == "v2"
    await page.see("[...document.querySelectorAll('main button')].find(e => e.textContent === 'Roll back').click()")
    await page.see("document.querySelector('dialog form').requestSubmit()")
    await page.until("document.querySelector('.timeline').textContent.includes('rollback')")
    assert fake.run(_current(fake)) == "v1"


async def _current(fake: FakeServer) -> str:
    await asyncio.sleep(0)
    return fake.app.catalog.adapter("support").aliases["current"]


async def _read_report(page: Page, fake: FakeServer) -> None:
    await page.open(f"{fake.http_url}/#/reports")
    await page.see("document.querySelector('main button').click()")
    await page.until("document.querySelector('iframe')")
    await asyncio.sleep(0.2)
    page.complaints = [one for one in page.complaints if "sandboxed" not in one]  # the report's script was blocked
